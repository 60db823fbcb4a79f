"""Names: what one may look like, what people call an adapter version, and what engines call it. Pure."""

from __future__ import annotations

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,47}$"  # of bases, adapters and routes: they share one namespace


def version_name(adapter: str, version: int) -> str:
    """What people and requests call it: `support@3`."""
    return f"{adapter}@{version}"


def engine_name(adapter: str, version: int, digest: str) -> str:
    """The name that engines serve it under; the digest in it keeps it from ever meaning other weights."""
    return f"{adapter}.v{version}.{digest[:12]}"
