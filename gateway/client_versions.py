"""The client's calls that an operator makes on one version. Only `gateway.client` uses it."""

from __future__ import annotations

from typing import Any, Protocol

from .client_models import Version
from .errors import Invalid


class _Caller(Protocol):
    def _one(self, kind: type[Version], path: str, *, method: str, body: dict[str, Any]) -> Version: ...


class VersionActs:
    """Quarantine's way out, retirement and its way back. Each needs an admin's key and a reason."""

    def release(self: _Caller, target: str, *, reason: str) -> Version:
        """Out of quarantine: the version is verified once more, then loaded and probed like a new one."""
        return self._one(Version, _path(target, "release"), method="POST", body={"reason": reason})

    def retire(self: _Caller, target: str, *, reason: str) -> Version:
        """Engines load the version no more; its bytes go when none can need them."""
        return self._one(Version, _path(target, "retire"), method="POST", body={"reason": reason})

    def restore(self: _Caller, target: str, *, reason: str) -> Version:
        """Bring a retired version back, if its bytes are still there."""
        return self._one(Version, _path(target, "restore"), method="POST", body={"reason": reason})


def _path(target: str, act: str) -> str:
    adapter, number = split_target(target)
    return f"/api/adapters/{adapter}/versions/{number}/{act}"


def split_target(target: str) -> tuple[str, str]:
    """`support@3` as ("support", "3")."""
    adapter, separator, number = target.partition("@")
    if not separator or not adapter or not number.isdigit():
        raise Invalid(
            f"{target!r} does not name a version; write adapter@number, such as support@1",
            code="bad_target",
            param="target",
        )
    return adapter, number
