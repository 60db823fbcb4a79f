"""How an attempt ends and what follows for its job: keys first, then the rows in one transaction, the disk last."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from ..database import Database
from ..settings import Settings
from .launch import Launcher, clean_job, job_directory
from .local import Jobs
from .models import Job, JobState
from .store import JobStore

log = structlog.get_logger(__name__)


class Endings:
    """Ends jobs, or sends them back into the queue. Raises `Conflict` when a job moved meanwhile."""

    def __init__(
        self, database: Database, settings: Settings, store: JobStore, launcher: Launcher, driver: Jobs
    ) -> None:
        self._database = database
        self._settings = settings
        self._store = store
        self._launcher = launcher
        self._driver = driver

    async def cancel(self, job: Job) -> None:
        """Stop what runs, then end the job."""
        if job.attempt:
            await self._driver.cancel(job.id, job.attempt)
        await self.end(job, JobState.CANCELLED, outcome="cancelled", message="The job was cancelled.")

    async def fail(self, job: Job, code: str, message: str) -> None:
        """End the job for a reason that is not its attempt's."""
        await self.end(job, JobState.FAILED, code=code, message=message)

    async def requeue(self, job: Job, *, outcome: str, message: str) -> None:
        """End the attempt and let the job wait for its next."""
        await self._launcher.revoke_keys(job)
        async with self._database.write() as connection:
            await self._store.finish_attempt(connection, job.id, job.attempt, outcome)
            await self._store.move(connection, job, JobState.QUEUED)
            await self._store.add_event(connection, job.id, message, level="warn")

    async def end(
        self,
        job: Job,
        state: JobState,
        *,
        outcome: str | None = None,
        code: str | None = None,
        message: str | None = None,
        result: dict[str, Any] | None = None,
    ) -> None:
        """End the job; `outcome` is the attempt's, for a job whose attempt ends with it."""
        await self._launcher.revoke_keys(job)
        async with self._database.write() as connection:
            await self.finish(connection, job, state, outcome=outcome, code=code, message=message, result=result)
        await self.tidy(job)

    async def finish(
        self,
        connection: AsyncConnection,
        job: Job,
        state: JobState,
        *,
        outcome: str | None = None,
        code: str | None = None,
        message: str | None = None,
        result: dict[str, Any] | None = None,
    ) -> None:
        """The rows of `end`, in the caller's transaction; revoke the job's keys before, and `tidy` after."""
        if outcome is not None and job.attempt:
            await self._store.finish_attempt(connection, job.id, job.attempt, outcome)
        failed = state is JobState.FAILED
        changes: dict[str, Any] = {"error_code": code, "error_message": message} if failed else {}
        if result is not None:
            changes["result"] = result
        await self._store.move(connection, job, state, **changes)
        if message or failed:
            await self._store.add_event(connection, job.id, message or str(code), level="error" if failed else "info")

    async def tidy(self, job: Job) -> None:
        """Give back the disk of a job that ended."""
        log.info("job finished", job=job.id, kind=job.kind)
        await asyncio.to_thread(clean_job, job_directory(self._settings, job.id))
