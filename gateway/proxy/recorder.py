"""Exposures, written behind the requests: in batches, at most a second old, and never in anyone's way."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import islice

import structlog
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from .. import tables
from ..database import Database
from ..errors import GatewayError
from ..metrics import Metrics

log = structlog.get_logger(__name__)

FLUSH_INTERVAL_S = 0.5
MAX_QUEUED = 50_000
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

    async def run(self) -> None:
        """Store what is queued, again and again, until `stop`; then once more."""
        was_failing = False
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), FLUSH_INTERVAL_S)
            is_last = self._stopping.is_set()
            try:
                await self.flush()
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

    async def _insert(self, batch: list[Exposure]) -> None:
        async with self._database.write() as connection:
            await connection.execute(insert(tables.exposures), [asdict(exposure) for exposure in batch])
