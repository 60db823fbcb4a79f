"""What is due now. Pure: from the settings and what was seen; reads no clock, no database, no disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from ..settings import RetentionSettings
from .kinds import EXPOSURES, JOB_EVENTS, KINDS, Kind

# A running split keeps its exposures beyond the rows that are allowed, up to this many times as many.
SPLIT_ALLOWANCE = 2
LEAST_ROWS, FIRST_ROWS, MOST_ROWS = 20, 200, 5_000
STEP_S = 0.05  # as long as a step may hold the write lock, about; a move of traffic waits for one at most
REST = 4.0  # times as long as a step took, the lock is left to others


@dataclass(frozen=True)
class Seen:
    """What the decision needs to know; a moment is None where there are not that many rows."""

    now: datetime
    exposures_beyond: datetime | None = None
    """Exposures before this are more than `exposures_max_rows`."""
    exposures_beyond_split: datetime | None = None
    """Exposures before this are more than `SPLIT_ALLOWANCE` times as many."""
    exposed_routes: tuple[str, ...] = ()
    split_routes: frozenset[str] = frozenset()
    crowded_jobs: tuple[tuple[str, datetime], ...] = ()
    """Jobs with more events than one may have, and the moment of the oldest event that stays."""


@dataclass(frozen=True)
class Overdue:
    """Rows of a kind that go: from `after` to before `before`, and with these values."""

    kind: Kind
    before: datetime
    after: datetime | None = None
    only: tuple[tuple[str, str], ...] = ()
    is_guarded: bool = True


def overdue(settings: RetentionSettings, seen: Seen) -> tuple[Overdue, ...]:
    """Everything that goes, the kinds in their order; no row twice."""
    by_age = {kind.name: seen.now - timedelta(days=kind.days(settings)) for kind in KINDS}
    return (
        *(Overdue(kind, by_age[kind.name]) for kind in KINDS),
        *_exposures_beyond(seen, by_age[EXPOSURES.name]),
        *_events_beyond(seen, by_age[JOB_EVENTS.name]),
    )


def _exposures_beyond(seen: Seen, aged: datetime) -> Iterator[Overdue]:
    """The oldest of what is more than the rows allowed; a running split's own only beyond its allowance."""
    if seen.exposures_beyond_split is not None:
        yield Overdue(EXPOSURES, seen.exposures_beyond_split, after=aged)
        aged = max(aged, seen.exposures_beyond_split)
    if seen.exposures_beyond is not None:
        for route in seen.exposed_routes:
            if route not in seen.split_routes:
                yield Overdue(EXPOSURES, seen.exposures_beyond, after=aged, only=(("route", route),))


def _events_beyond(seen: Seen, aged: datetime) -> Iterator[Overdue]:
    for job_id, oldest_kept in seen.crowded_jobs:
        yield Overdue(JOB_EVENTS, oldest_kept, after=aged, only=(("job_id", job_id),), is_guarded=False)


def next_rows(rows: int, took_s: float) -> int:
    """How many rows the next step removes, from how long the last one held the lock."""
    if took_s > STEP_S:
        return max(LEAST_ROWS, rows // 2)
    return min(MOST_ROWS, rows * 2) if took_s < STEP_S / 2 else rows
