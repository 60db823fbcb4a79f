"""Count what is over, or remove it: rows in small steps that leave the write lock to others, files one by one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from typing import Literal

import structlog

from ..database import Database
from ..errors import Unavailable
from ..ids import now
from ..settings import Settings
from . import leftovers, rows
from .due import FIRST_ROWS, REST, Overdue, Seen, next_rows, overdue
from .leftovers import LEFTOVERS, Leftover, Leftovers
from .models import GcReport, KindReport

log = structlog.get_logger(__name__)

_LEAST_REST_S = 0.02


class Retention:
    """What is over goes. Several may do it at once: every step is safe to take again."""

    def __init__(self, database: Database, settings: Settings, *, clock: Callable[[], datetime] = now) -> None:
        self._database = database
        self._settings = settings
        self._clock = clock

    async def survey(self) -> GcReport:
        """What would go now. Removes nothing."""
        moment, tally = self._clock(), Tally()
        seen = await rows.look(self._database, self._settings.retention, moment)
        for due in overdue(self._settings.retention, seen):
            async with self._database.read() as connection:
                found, oldest = await rows.count(connection, due)
            tally.add(due.kind.name, "rows", min(found, rows.COUNTED), due.kind.row_bytes * found, oldest)
            tally.is_more |= {due.kind.name} if found > rows.COUNTED else set()
        for kind in LEFTOVERS:
            for leftover in await self._unnamed(kind, moment - kind.age(self._settings)):
                tally.add(kind.name, "files", 1, leftover.size_bytes, leftover.at)
        return GcReport(dry_run=True, kinds=tally.reports(), notes=_notes(seen))

    async def sweep(self, *, within_s: float = float("inf")) -> GcReport:
        """Remove what is over, for as long as there is time; the next sweep goes on with what is left."""
        moment, until, tally = self._clock(), time.monotonic() + within_s, Tally()
        seen = await rows.look(self._database, self._settings.retention, moment)
        is_complete = True
        try:
            for due in overdue(self._settings.retention, seen):
                is_complete &= await self._remove_rows(due, tally, until)
            for kind in LEFTOVERS:
                is_complete &= await self._remove_files(kind, moment - kind.age(self._settings), tally, until)
        except Unavailable as error:  # whoever holds the database needs it more
            log.info("retention waits for the database", code=error.code)
            is_complete = False
        report = GcReport(dry_run=False, is_complete=is_complete, kinds=tally.reports(), notes=_notes(seen))
        if not report.is_empty:
            log.info("what was over is gone", **{kind.kind: kind.count for kind in report.kinds})
        return report

    async def tick(self) -> None:
        """One sweep, for a loop."""
        await self.sweep()

    async def _remove_rows(self, due: Overdue, tally: Tally, until: float) -> bool:
        """False when time was up before all were gone. Only `remove` holds the lock, and it rests longer than it holds it."""
        step = FIRST_ROWS
        async with self._database.read() as connection:
            oldest = await rows.oldest(connection, due)
        while oldest is not None:
            if time.monotonic() > until:
                return False
            async with self._database.write() as connection:
                started = time.monotonic()
                gone = await rows.remove(connection, due, rows=step)
            took_s = time.monotonic() - started
            tally.add(due.kind.name, "rows", gone, due.kind.row_bytes * gone, oldest)
            if gone < step:
                return True
            step = next_rows(step, took_s)
            await asyncio.sleep(max(_LEAST_REST_S, REST * took_s))
        return True

    async def _remove_files(self, kind: Leftovers, before: datetime, tally: Tally, until: float) -> bool:
        gone = 0
        found = await self._unnamed(kind, before)
        for leftover in found:
            if time.monotonic() > until:
                break
            await self._database.check_fence()
            if await asyncio.to_thread(leftovers.remove, leftover, before):
                tally.add(kind.name, "files", 1, leftover.size_bytes, leftover.at)
                gone += 1
        if gone:
            async with self._database.write() as connection:
                await rows.add_deleted(connection, kind.name, gone)
        return gone == len(found) or time.monotonic() <= until

    async def _unnamed(self, kind: Leftovers, before: datetime) -> list[Leftover]:
        """The disk first, the rows after it: what was named in between is kept."""
        found = await asyncio.to_thread(leftovers.find, kind, self._settings, before)
        if not found:
            return []
        async with self._database.read() as connection:
            kept = await leftovers.kept_names(connection, kind, before)
        return [leftover for leftover in found if leftovers.name_of(leftover) not in kept]


class Tally:
    """What was found or removed so far, by kind."""

    def __init__(self) -> None:
        self.is_more: set[str] = set()
        self._found: dict[str, KindReport] = {}

    def add(self, kind: str, unit: Literal["rows", "files"], count: int, size_bytes: int, at: datetime | None) -> None:
        """So many more."""
        if not count:
            return
        had = self._found.get(kind) or KindReport(kind=kind, unit=unit, count=0, size_bytes=0, oldest=at)
        self._found[kind] = had.model_copy(
            update={
                "count": had.count + count,
                "size_bytes": had.size_bytes + size_bytes,
                "oldest": min(filter(None, (had.oldest, at)), default=None),
            }
        )

    def reports(self) -> tuple[KindReport, ...]:
        """Each kind that had any, in the order in which they came."""
        return tuple(
            report.model_copy(update={"is_more": report.kind in self.is_more}) for report in self._found.values()
        )


def _notes(seen: Seen) -> tuple[str, ...]:
    if seen.exposures_beyond_split is None or not seen.split_routes:
        return ()
    text = (
        f"there are more than twice retention.exposures_max_rows exposures, so those of running splits "
        f"({', '.join(sorted(seen.split_routes))[:200]}) go before retention.exposures_days are over; raise it"
    )
    return (text,)
