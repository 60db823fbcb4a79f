"""`turnout serve` with this folder's controller. It forgives deaths sooner, for tests cause several."""

from __future__ import annotations

from gateway import supervisor

supervisor.STABLE_AFTER_S = 1.0
_Part = supervisor._Part


def _part(module: str) -> supervisor._Part:
    return _Part("tests.homes.controller" if module == "gateway.controller" else module)


if __name__ == "__main__":
    supervisor._Part = _part  # type: ignore[assignment, misc]
    supervisor.main()
