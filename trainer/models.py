"""What training tells of itself: plain data, no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """One thing that training has to say; `numbers` make it a point on a chart."""

    message: str
    level: Literal["info", "warn", "error"] = "info"
    numbers: dict[str, float] = field(default_factory=dict)


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Places:
    """Where training writes."""

    bundle: Path
    checkpoints: Path


@dataclass(frozen=True)
class Trained:
    """What came of it."""

    bundle: Path
    digest: str
    steps: int
    tokens: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Dropped:
    """A row that is not trained on."""

    line: int
    reason: str
