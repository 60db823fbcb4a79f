"""The life of one engine replica as decisions. Pure: reads no clock, no database, no engine.

```
stopped ──▶ starting ──▶ testing ──▶ ready
   ▲            │            │          │      starting: its process runs, its server does not answer yet
   └── failed ◀─┴────────────┴──────────┘      testing: self-test, then what it should hold is loaded and probed
```

It fails when its process is gone, when it says that its core is dead, when the self-test or a probe finds a fault that only
a restart cures, and when it hangs: asked, and without any sign of work. Slowness is no fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

from ..registry.models import ReplicaState
from ..settings import EngineSettings

Health = Literal["unknown", "healthy", "dead", "silent"]

# An engine that computes gets this many times the patience that a silent one gets.
PATIENCE_WITH_WORK = 30
MAX_BACKOFF_S = 60.0


@dataclass(frozen=True, slots=True)
class Sight:
    """All that a decision about a replica rests on. Durations are monotonic."""

    state: ReplicaState
    process: Literal["running", "exited", "absent"]
    exit_code: int | None = None
    health: Health = "unknown"
    age_s: float = 0.0  # of the process
    silent_s: float = 0.0  # without any sign of work, though it was asked to
    fruitless_s: float = 0.0  # without a token, computing or not, though it was asked to
    is_busy: bool = False  # it was seen computing or reading files a moment ago
    has_worked: bool = True  # since its start
    wait_s: float = 0.0  # left of the pause before the next start
    is_tested: bool = False
    is_restored: bool = False
    fault: str | None = None  # found by the self-test or a probe; only a restart helps


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now, and why."""

    step: Literal["wait", "start", "test", "serve", "fail"]
    reason: str = ""


WAIT = Decision("wait")


def decide(seen: Sight, engine: EngineSettings) -> Decision:
    """Choose the replica's next step. Reads no clock; safe to call twice."""
    match seen.state:
        case ReplicaState.STOPPED | ReplicaState.FAILED:
            return WAIT if seen.wait_s > 0 else Decision("start")
        case ReplicaState.STARTING:
            if gone := _gone(seen):
                return Decision("fail", gone)
            if seen.health == "healthy":
                return Decision("test")
            if seen.age_s > engine.start_timeout_s and not seen.is_busy:
                return Decision("fail", f"not healthy {seen.age_s:.0f} s after its start, and idle")
            return WAIT
        case ReplicaState.TESTING | ReplicaState.READY:
            if broken := _gone(seen) or _broken(seen, engine):
                return Decision("fail", broken)
            if seen.state is ReplicaState.TESTING and seen.is_tested and seen.is_restored:
                return Decision("serve")
            return WAIT
        case unreachable:
            assert_never(unreachable)


def _gone(seen: Sight) -> str | None:
    if seen.process == "running":
        return None
    code = "" if seen.exit_code is None else f" with {seen.exit_code}"
    return f"the engine's process ended{code}"


def _broken(seen: Sight, engine: EngineSettings) -> str | None:
    if seen.fault is not None:
        return seen.fault
    if seen.health == "dead":
        return "the engine says that its core is dead"
    patience_s = engine.hang_timeout_s if seen.has_worked else engine.first_work_timeout_s
    if seen.silent_s > patience_s:
        return f"the engine did no work for {seen.silent_s:.0f} s though it was asked to"
    if seen.fruitless_s > PATIENCE_WITH_WORK * patience_s:
        return f"the engine computed for {seen.fruitless_s:.0f} s without a token though it was asked for one"
    return None


def backoff_s(failures: int) -> float:
    """Pause before the next start: none after a first death, then 1, 2, 4, ... seconds up to the cap."""
    return 0.0 if failures <= 1 else min(MAX_BACKOFF_S, 2.0 ** min(failures - 2, 16))
