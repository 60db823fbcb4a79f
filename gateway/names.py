"""Names of adapter versions: what people call one, and what engines call it."""

from __future__ import annotations


def version_name(adapter: str, version: int) -> str:
    """What people and requests call it: `support@3`."""
    return f"{adapter}@{version}"


def engine_name(adapter: str, version: int, digest: str) -> str:
    """The name that engines serve it under; the digest in it keeps it from ever meaning other weights."""
    return f"{adapter}.v{version}.{digest[:12]}"
