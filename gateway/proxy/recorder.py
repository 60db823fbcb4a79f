"""Exposures, written behind the requests: in batches, at most a second old, and never in anyone's way."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice
from time import monotonic

import structlog
from sqlalchemy import and_, insert, or_, update
from sqlalchemy.exc import IntegrityError

from .. import tables
from ..database import Database
from ..errors import GatewayError
from ..ids import now
from ..metrics import Metrics
from ..names import parse_pin

log = structlog.get_logger(__name__)

FLUSH_INTERVAL_S = 0.5
MAX_QUEUED = 50_000
USES_INTERVAL_S = 1.0  # between notes of which versions answer; the controller unloads none that was noted lately
_BATCH = 1_000


@dataclass(frozen=True, slots=True)
class Exposure:
    """One assigned request, and how it went."""

    request_id: str
    project_id: str
    at: datetime
    route: str
    variant: str
    version: str
    digest: str
    unit: str
    replica_id: str
    status: int
    finish_reason: str | None
    latency_s: float
    first_token_s: float | None
    prompt_tokens: int | None
    completion_tokens: int | None


class Recorder:
    """A bounded queue and the loop that empties it into the database."""

    def __init__(self, database: Database, metrics: Metrics, *, max_queued: int = MAX_QUEUED) -> None:
        self._database = database
        self._metrics = metrics
        self._max_queued = max_queued
        self._queue: deque[Exposure] = deque()
        self._answering: Counter[str] = Counter()  # versions by the requests that they answer now
        self._used: set[str] = set()  # since the last note
        self._noted_at = 0.0
        self._flushing = asyncio.Lock()
        self._stopping = asyncio.Event()

    @property
    def queued(self) -> int:
        """Records that are not stored yet."""
        return len(self._queue)

    def record(self, exposure: Exposure) -> None:
        """Queue a record; when there is no room for it, it is dropped and counted."""
        if len(self._queue) >= self._max_queued:
            self._metrics.exposures_dropped.inc()
            return
        self._queue.append(exposure)

    @contextmanager
    def using(self, version: str) -> Iterator[None]:
        """While a request is answered by this version."""
        self._answering[version] += 1
        self._used.add(version)
        try:
            yield
        finally:
            self._used.add(version)
            self._answering[version] -= 1
            if not self._answering[version]:
                del self._answering[version]

    async def run(self) -> None:
        """Store what is queued, again and again, until `stop`; then once more."""
        was_failing = False
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), FLUSH_INTERVAL_S)
            is_last = self._stopping.is_set()
            try:
                await self.flush()
                await self.note_uses()
                was_failing = False
            except Exception as error:
                if not was_failing:
                    known = isinstance(error, GatewayError)
                    log.error(
                        "exposures wait for the database", error=str(error), queued=self.queued, exc_info=not known
                    )
                was_failing = True
            if is_last:
                return

    def stop(self) -> None:
        """Let `run` end after a last flush. Cancelling it could cut a commit in two."""
        self._stopping.set()

    async def flush(self) -> None:
        """Store everything queued now. What cannot be stored stays queued, in order."""
        async with self._flushing:
            while batch := list(islice(self._queue, _BATCH)):
                try:
                    await self._insert(batch)
                    self._metrics.exposures_written.inc(len(batch))
                except IntegrityError as error:
                    # Never stored by being tried again, and it would keep all later ones waiting.
                    self._metrics.exposures_dropped.inc(len(batch))
                    log.error("exposures dropped", error=str(error.orig), count=len(batch))
                for _ in batch:
                    self._queue.popleft()

    async def note_uses(self) -> None:
        """Say which versions answered since the last note, or are answering, at most once a second."""
        used = self._used | set(self._answering)
        if not used or monotonic() - self._noted_at < USES_INTERVAL_S:
            return
        self._used, self._noted_at = set(), monotonic()
        table = tables.adapter_versions
        pins = [pin for pin in map(parse_pin, used) if pin is not None]  # the base model is loaded in any case
        if not pins:
            return
        mine = or_(*(and_(table.c.adapter == adapter, table.c.version == number) for adapter, number in pins))
        async with self._database.write() as connection:
            await connection.execute(update(table).where(mine).values(used_at=now()))

    async def _insert(self, batch: list[Exposure]) -> None:
        async with self._database.write() as connection:
            await connection.execute(insert(tables.exposures), [asdict(exposure) for exposure in batch])
