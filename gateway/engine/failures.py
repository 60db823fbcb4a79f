"""What became of an engine's starts, and what the present one waits for: for people who wait."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..registry.models import ReplicaState

_TAIL_BYTES = 4096
_MAX_LINE = 300


@dataclass(frozen=True, slots=True)
class Failures:
    """Failures in a row, and how many of them say that another start will end the same way."""

    in_a_row: int = 0
    futile_starts: int = 0
    last: str | None = None

    def after(self, reason: str, *, has_served: bool, is_blamed: bool) -> Failures:
        """One more. A start is futile when it ended before it served; not when an adapter is blamed, which is soon out."""
        is_futile = not has_served and not is_blamed
        before = 0 if has_served else self.futile_starts
        return Failures(self.in_a_row + 1, before + is_futile, reason)

    def once_served(self) -> Failures:
        """The present start serves, so whatever stood in the way is gone."""
        return replace(self, futile_starts=0)


def waits_for(state: ReplicaState, *, is_tested: bool) -> str | None:
    """What a start has still before it; None when it waits for nothing."""
    match state:
        case ReplicaState.STARTING:
            return "its process to answer"
        case ReplicaState.TESTING:
            return "its adapters" if is_tested else "its self-test"
        case _:
            return None


def told(reason: str, failures: Failures, *, log: str, pause_s: float) -> str:
    """A failure as the server's terminal shows it."""
    count = "" if failures.in_a_row == 1 else f" ({failures.in_a_row} times in a row)"
    again = "is started again" if pause_s == 0 else f"is started again in {pause_s:.0f} s"
    return f"The engine failed{count}: {reason}\n  Its log is {log}; it {again}."


def last_line(path: Path) -> str:
    """How a log ends, in few words."""
    if not path.is_file():
        return "(empty)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip()[-_MAX_LINE:] for line in reversed(lines) if line.strip()), "(empty)")
