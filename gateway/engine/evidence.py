"""Is a version to blame when the engine fails with it? Pure: the clock is given.

A failure counts against a version only when it was alone on its way in and a neighbour was well on the same start of the
engine; it is condemned when that repeats. Whatever counts or not, each failure makes the next attempt wait longer,
and after a death that wait begins only when the engine serves again: else it would die of the same at each start.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["failure", "death"]

# Failed loads or answers, and deaths of the engine, that are taken for the version's own doing. A death costs everybody.
MAX_FAILURES = 3
MAX_DEATHS = 2
FIRST_PAUSE_S = 1.0
LATEST_PAUSE_S = 600.0


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What is held against one version since it was last well."""

    attempts: int = 0
    failures: int = 0
    deaths: int = 0
    not_before: float = 0.0  # infinite after a death: the pause begins when the engine takes traffic again

    @property
    def pause_s(self) -> float:
        """How long the next attempt waits."""
        return min(LATEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self.attempts - 1, 16))

    @property
    def is_proven(self) -> bool:
        """Whether it repeated often enough."""
        return self.failures >= MAX_FAILURES or self.deaths >= MAX_DEATHS

    def after(self, kind: Kind, *, counts: bool, now: float) -> Suspicion:
        """One failure more."""
        after = replace(
            self,
            attempts=self.attempts + 1,
            failures=self.failures + (counts and kind == "failure"),
            deaths=self.deaths + (counts and kind == "death"),
        )
        return replace(after, not_before=math.inf if kind == "death" else now + after.pause_s)


@dataclass(slots=True)
class Evidence:
    """Suspicions by the version's name in engines. Outlives starts of the engine, not the controller."""

    by_name: dict[str, Suspicion] = field(default_factory=dict)

    def add(self, name: str, kind: Kind, *, is_alone: bool, has_neighbour: bool, now: float) -> Suspicion:
        """Note a failure; what is held against the version now."""
        before = self.by_name.get(name, Suspicion())
        self.by_name[name] = before.after(kind, counts=is_alone and has_neighbour, now=now)
        return self.by_name[name]

    def begin_pauses(self, now: float) -> None:
        """The engine takes traffic: who was on its way in when it died waits from now on."""
        for name, found in self.by_name.items():
            if math.isinf(found.not_before):
                self.by_name[name] = replace(found, not_before=now + found.pause_s)

    def acquit(self, name: str) -> None:
        """It is well now."""
        self.by_name.pop(name, None)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget versions that nobody wants any more; one that is released later starts anew."""
        self.by_name = {name: found for name, found in self.by_name.items() if name in names}

    def paused(self, now: float) -> set[str]:
        """Versions whose next attempt is not due."""
        return {name for name, found in self.by_name.items() if now < found.not_before}
