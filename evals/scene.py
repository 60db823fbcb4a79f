"""What the checks of one evaluation share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import FingerprintMismatch
from .gates import GateResult
from .report import Comparison
from .scores import Fingerprint, ScoreCache
from .serving import Serving, Target
from .statistics import PairedCounts


@dataclass(frozen=True, slots=True)
class Scene:
    """The version under evaluation, its baselines, and the means to ask them."""

    folder: Path
    serving: Serving
    candidate: Target
    base: Target
    stable: Target
    cache: ScoreCache
    fingerprint: Fingerprint  # of answers through the gateway
    local_fingerprint: Fingerprint  # of answers by hf + peft in this process
    base_path: Path
    candidate_dir: Path
    reference: Path
    training_files: tuple[Path, ...]
    look: int
    say: Callable[[str], None]

    def same_engine(self, engines: Iterable[str]) -> None:
        """Raise when an answer came from an engine with another version or configuration than the evaluation began with."""
        others = {engine for engine in engines if engine != self.fingerprint.engine}
        if others:
            raise FingerprintMismatch(
                f"the engine changed during the evaluation: {self.fingerprint.engine} at its start, "
                f"{', '.join(sorted(others))} later; evaluate again"
            )


def comparison(name: str, baseline: str, result: GateResult, counts: PairedCounts) -> Comparison:
    """A gate's result as a line of the report."""
    return Comparison(
        name=name, baseline=baseline, verdict=result.verdict, reason=result.reason, interval=result.interval,
        better=counts.better, worse=counts.worse,
    )  # fmt: skip


def since(started: float) -> float:
    """Seconds since a reading of the monotonic clock."""
    return round(time.monotonic() - started, 3)
