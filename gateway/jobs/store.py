"""SQL of jobs, their attempts and events. Every change of a job is a compare-and-swap on its revision."""

from __future__ import annotations

import builtins
import hashlib
from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, Table, and_, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..database import Database
from ..errors import Conflict, NotFound
from ..fitting import fit
from ..ids import new_id, now
from .models import Job, JobEvent, JobKind, JobState, ProgressLine
from .state_machine import may_move

FINAL_STATES = tuple(state for state in JobState if state.is_final)


class JobStore:
    """Reads by itself; writes inside the caller's transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ---- jobs ----

    async def insert(self, connection: AsyncConnection, job: Job) -> bool:
        """Add a job; False when its id is taken."""
        row = fit(tables.jobs, job.model_dump(mode="python", exclude={"spec"}))
        try:
            async with connection.begin_nested():
                await connection.execute(insert(tables.jobs).values(**row, spec=job.spec.model_dump(mode="json")))
        except IntegrityError:
            return False
        return True

    async def get(self, job_id: str, *, project_id: str | None = None) -> Job:
        """One job; of another project it does not exist."""
        async with self._database.read() as connection:
            return await self.get_in(connection, job_id, project_id=project_id)

    async def get_in(
        self, connection: AsyncConnection, job_id: str, *, project_id: str | None = None, param: str = "job_id"
    ) -> Job:
        """`get` in the caller's transaction."""
        query = select(tables.jobs).where(tables.jobs.c.id == job_id)
        if project_id is not None:
            query = query.where(tables.jobs.c.project_id == project_id)
        row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFound(f"no job has the id {job_id[:60]!r}", code="job_not_found", param=param)
        return _job(row)

    async def list(
        self,
        *,
        project_id: str | None = None,
        kinds: Collection[JobKind] | None = None,
        target: str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Jobs, newest first; those older than the job `after`."""
        table = tables.jobs
        query = select(table).order_by(table.c.created_at.desc(), table.c.id.desc()).limit(limit)
        if project_id is not None:
            query = query.where(table.c.project_id == project_id)
        if kinds is not None:
            query = query.where(table.c.kind.in_(tuple(kinds)))
        if target is not None:
            query = query.where(table.c.spec["target"].as_string() == target)
        async with self._database.read() as connection:
            if after is not None:
                last = await self.get_in(connection, after, project_id=project_id, param="after")
                same_time = and_(table.c.created_at == last.created_at, table.c.id < last.id)
                query = query.where(or_(table.c.created_at < last.created_at, same_time))
            rows = (await connection.execute(query)).all()
        return [_job(row) for row in rows]

    async def unfinished(self) -> builtins.list[Job]:
        """Every job that is not final, oldest first."""
        async with self._database.read() as connection:
            return await self.unfinished_in(connection)

    async def unfinished_in(self, connection: AsyncConnection, *, kind: JobKind | None = None) -> builtins.list[Job]:
        """`unfinished` in the caller's transaction, perhaps of one kind."""
        table = tables.jobs
        query = select(table).where(table.c.state.not_in(FINAL_STATES)).order_by(table.c.created_at, table.c.id)
        if kind is not None:
            query = query.where(table.c.kind == kind)
        return [_job(row) for row in await connection.execute(query)]

    async def move(self, connection: AsyncConnection, job: Job, to: JobState | None = None, **changes: Any) -> Job:
        """Change a job that still is as it was read; raises `Conflict` when it moved meanwhile, or may not move so."""
        if to is not None and to is not job.state and not may_move(job.kind, job.state, to):
            raise Conflict(f"job {job.id} is {job.state}; it cannot become {to}", code="bad_transition")
        values: dict[str, Any] = {**fit(tables.jobs, changes), "revision": job.revision + 1}
        if to is not None:
            values["state"] = to
            if to.is_final:
                values.setdefault("finished_at", now())
        moved = await connection.execute(
            update(tables.jobs)
            .where(tables.jobs.c.id == job.id, tables.jobs.c.revision == job.revision)
            .values(**values)
        )
        if moved.rowcount != 1:
            raise Conflict(f"job {job.id} changed meanwhile; look again", code="job_moved")
        return job.model_copy(update=values)

    async def projects(self) -> set[str]:
        """Every project that ever had a job."""
        async with self._database.read() as connection:
            return set((await connection.execute(select(tables.jobs.c.project_id).distinct())).scalars())

    async def file_digests(self, file_ids: Collection[str]) -> dict[str, str]:
        """What was uploaded under these ids."""
        query = select(tables.files.c.id, tables.files.c.digest).where(tables.files.c.id.in_(tuple(file_ids)))
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        return {row.id: row.digest for row in rows}

    # ---- attempts ----

    async def start_attempt(self, connection: AsyncConnection, job_id: str, attempt: int, token: str) -> None:
        """Record an attempt; of its token only the hash is kept."""
        started = now()
        await connection.execute(
            insert(tables.job_attempts).values(
                job_id=job_id,
                attempt=attempt,
                token_hash=hash_token(token),
                started_at=started,
                heartbeat_at=started,
                progress_offset=0,
            )
        )

    async def attempt(self, job_id: str, attempt: int) -> Row[Any]:
        """One attempt's row."""
        table = tables.job_attempts
        async with self._database.read() as connection:
            return (
                await connection.execute(select(table).where(table.c.job_id == job_id, table.c.attempt == attempt))
            ).one()

    async def finish_attempt(self, connection: AsyncConnection, job_id: str, attempt: int, outcome: str) -> None:
        """Close an attempt that is open: succeeded, failed, crashed, lost, cancelled."""
        table = tables.job_attempts
        where = and_(table.c.job_id == job_id, table.c.attempt == attempt, table.c.finished_at.is_(None))
        await connection.execute(update(table).where(where).values(finished_at=now(), outcome=outcome))

    async def count_attempts(self, job_id: str, outcome: str) -> int:
        """How many attempts ended so."""
        table = tables.job_attempts
        query = select(func.count()).where(table.c.job_id == job_id, table.c.outcome == outcome)
        async with self._database.read() as connection:
            return int((await connection.execute(query)).scalar_one())

    async def advance_progress(
        self, connection: AsyncConnection, job: Job, *, offset: int, lines: Sequence[ProgressLine]
    ) -> None:
        """Store progress lines and how far they were read, only while the attempt is the job's current one."""
        table = tables.job_attempts
        where = (table.c.job_id == job.id) & (table.c.attempt == job.attempt) & (table.c.progress_offset < offset)
        moved = await connection.execute(update(table).where(where).values(progress_offset=offset, heartbeat_at=now()))
        if moved.rowcount != 1:
            raise Conflict(f"progress of job {job.id} was read by another controller", code="job_moved")
        at, events = datetime.min.replace(tzinfo=UTC), []
        for line in lines:
            at = max(line.at, at + timedelta(microseconds=1))  # so that time alone keeps the order of the lines
            events.append(_event(job.id, line.message, level=line.level, type=line.type, at=at, data=line.data))
        if events:
            await connection.execute(insert(tables.job_events), events)

    # ---- events ----

    async def add_event(
        self,
        connection: AsyncConnection,
        job_id: str,
        message: str,
        *,
        level: str = "info",
        type: str = "message",  # noqa: A002  (OpenAI's word)
        at: datetime | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        """Append an event."""
        event = _event(job_id, message, level=level, type=type, at=at or now(), data=data)
        await connection.execute(insert(tables.job_events).values(**event))

    async def events(
        self, job_id: str, *, after: str | None = None, limit: int = 20, newest_first: bool = True
    ) -> builtins.list[JobEvent]:
        """A page of a job's events, in the order they were recorded."""
        table = tables.job_events
        query = select(table).where(table.c.job_id == job_id)
        async with self._database.read() as connection:
            if after is not None:
                last = (await connection.execute(query.where(table.c.id == after))).one_or_none()
                if last is None:
                    raise NotFound(f"job {job_id} has no event {after[:60]!r}", code="event_not_found", param="after")
                query = query.where(_beyond(table, last, descending=newest_first))
            order = (table.c.at.desc(), table.c.id.desc()) if newest_first else (table.c.at, table.c.id)
            rows = (await connection.execute(query.order_by(*order).limit(limit))).all()
        return [JobEvent.model_validate(dict(row._mapping)) for row in rows]


def _event(
    job_id: str,
    message: str,
    *,
    level: str,
    type: str,  # noqa: A002
    at: datetime,
    data: dict[str, Any] | None,
) -> dict[str, Any]:
    said = fit(tables.job_events, {"message": message, "data": data})
    event = {"id": new_id("ftevent-"), "job_id": job_id, "at": at, "level": level, "type": type, **said}
    return JobEvent.model_validate(event).model_dump()


def hash_token(token: str) -> str:
    """What is stored of an attempt's one-time token."""
    return hashlib.sha256(token.encode()).hexdigest()


def _beyond(table: Table, last: Row[Any], *, descending: bool) -> ColumnElement[bool]:
    if descending:
        return or_(table.c.at < last.at, and_(table.c.at == last.at, table.c.id < last.id))
    return or_(table.c.at > last.at, and_(table.c.at == last.at, table.c.id > last.id))


def _job(row: Row[Any]) -> Job:
    return Job.model_validate(dict(row._mapping))
