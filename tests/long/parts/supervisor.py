"""The supervisor over this folder's gateway and controller. It forgives deaths sooner, for a test causes many of them."""

from __future__ import annotations

from gateway import supervisor

supervisor.STABLE_AFTER_S = 1.0
_Part = supervisor._Part


def _part(module: str) -> supervisor._Part:
    return _Part({"gateway.app": "tests.long.parts.gateway"}.get(module, "tests.long.parts.controller"))


if __name__ == "__main__":
    supervisor._Part = _part  # type: ignore[assignment, misc]
    supervisor.main()
