"""Rows of jobs: moved only from where they were read, only where a job may go, and told once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway import tables
from gateway.database import DEFAULT_PROJECT, Database
from gateway.errors import Conflict
from gateway.ids import now
from gateway.jobs.models import Job, JobKind, JobState, ProgressLine, VerifySpec
from gateway.jobs.store import JobStore
from tests.registry_world import a_database, a_home

JOB = Job(
    id="verify-1",
    kind=JobKind.VERIFY,
    state=JobState.QUEUED,
    spec=VerifySpec(target="support@1", digest="d" * 64),
    created_at=now(),
    created_by="controller",
    project_id=DEFAULT_PROJECT,
)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with a_database(a_home(tmp_path / "home")) as database:
        async with database.write() as connection:
            assert await JobStore(database).insert(connection, JOB)
        yield database


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


async def test_a_job_that_moved_since_it_was_read_is_not_moved(database: Database, store: JobStore) -> None:
    async with database.write() as connection:
        await store.move(connection, JOB, JobState.RUNNING, attempt=1)

    with pytest.raises(Conflict) as caught:
        async with database.write() as connection:
            await store.move(connection, JOB, JobState.CANCELLED)

    assert caught.value.code == "job_moved"
    found = await store.get(JOB.id)
    assert (found.state, found.attempt, found.revision) == (JobState.RUNNING, 1, 1)


async def test_a_change_that_is_no_move_needs_the_job_as_it_was_read_too(database: Database, store: JobStore) -> None:
    async with database.write() as connection:
        await store.move(connection, JOB, cancel_requested=True)

    with pytest.raises(Conflict, match="look again"):
        async with database.write() as connection:
            await store.move(connection, JOB, result={"late": True})

    assert (await store.get(JOB.id)).result is None


@pytest.mark.parametrize("to", [JobState.SUCCEEDED, JobState.PUBLISHING, JobState.VALIDATING_FILES])
async def test_a_job_goes_only_where_its_kind_may(database: Database, store: JobStore, to: JobState) -> None:
    with pytest.raises(Conflict) as caught:
        async with database.write() as connection:
            await store.move(connection, JOB, to)

    assert caught.value.code == "bad_transition"
    assert await store.get(JOB.id) == JOB


async def test_a_job_that_is_over_stays_over(database: Database, store: JobStore) -> None:
    async with database.write() as connection:
        over = await store.move(connection, JOB, JobState.CANCELLED)

    with pytest.raises(Conflict):
        async with database.write() as connection:
            await store.move(connection, over, JobState.QUEUED)

    assert (await store.get(JOB.id)).state is JobState.CANCELLED


async def test_progress_that_was_read_once_is_not_told_again(database: Database, store: JobStore) -> None:
    line = ProgressLine(at=now(), message="loss 1.0")
    async with database.write() as connection:
        await store.start_attempt(connection, JOB.id, 1, "token")
        job = await store.move(connection, JOB, JobState.RUNNING, attempt=1)
        await store.advance_progress(connection, job, offset=20, lines=[line])

    for offset in (20, 10):
        with pytest.raises(Conflict, match="another controller"):
            async with database.write() as connection:
                await store.advance_progress(connection, job, offset=offset, lines=[line])

    assert [event.message for event in await store.events(JOB.id)] == ["loss 1.0"]
    assert (await store.attempt(JOB.id, 1)).progress_offset == 20


async def test_of_its_token_a_job_keeps_the_hash(database: Database, store: JobStore) -> None:
    async with database.write() as connection:
        await store.start_attempt(connection, JOB.id, 1, "token")
    async with database.read() as connection:
        rows = (await connection.execute(tables.job_attempts.select())).mappings().all()

    assert "token" not in [*rows[0].values()]
