"""Names: what one may look like, what people call an adapter version, and what engines call it. Pure."""

from __future__ import annotations

import re

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,47}$"  # of bases, adapters and routes: they share one namespace
_PIN = re.compile(r"^(?P<adapter>[a-z0-9][a-z0-9-]{0,47})@(?P<version>[1-9][0-9]{0,8})$")


def version_name(adapter: str, version: int) -> str:
    """What people and requests call it: `support@3`."""
    return f"{adapter}@{version}"


def parse_pin(target: str) -> tuple[str, int] | None:
    """`support@3` as ("support", 3); None for a base model's name."""
    found = _PIN.match(target)
    return (found["adapter"], int(found["version"])) if found else None


def engine_name(adapter: str, version: int, digest: str) -> str:
    """The name that engines serve it under; the digest in it keeps it from ever meaning other weights."""
    return f"{adapter}.v{version}.{digest[:12]}"
