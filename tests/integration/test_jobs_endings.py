"""How attempts begin and end, decided directly: whose files are looked at first, and which keys are worth anything after."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from gateway import tables
from gateway.errors import Conflict, Invalid, Refused
from gateway.jobs.endings import Endings
from gateway.jobs.launch import Launcher
from gateway.jobs.models import Job, JobState, ProcessState, ProcessStatus
from gateway.registry.manifest import WEIGHTS_FILE
from gateway.registry.models import AdapterVersion
from gateway.routing.store import create_route_for
from tests.fakes.jobs import FakeJobs
from tests.jobs_world import PRINCIPAL, STRANGER, World, a_world


@dataclass(frozen=True)
class Ending:
    """Endings and a launcher over a driver that runs nothing."""

    world: World
    driver: FakeJobs
    launcher: Launcher
    endings: Endings

    async def running(self, job: Job) -> Job:
        """The job, with a first attempt that was launched."""
        async with self.world.database.write() as connection:
            await self.world.store.start_attempt(connection, job.id, job.attempt + 1, "token")
            job = await self.world.store.move(connection, job, JobState.RUNNING, attempt=job.attempt + 1)
        await self.launcher.launch(job, "token")
        return job

    async def evaluation(self, target: str = "support@1") -> Job:
        job, _ = await self.world.service.create_evaluation(target, "emails", principal=PRINCIPAL)
        return job

    async def keys(self) -> list[str]:
        return [key["name"] for key in await self.world.rows(tables.api_keys)]


@pytest.fixture
async def ending(tmp_path: Path) -> AsyncIterator[Ending]:
    async with a_world(tmp_path / "home") as world:
        driver = FakeJobs(lambda spec: ProcessStatus(state=ProcessState.RUNNING))
        launcher = Launcher(
            world.database, world.settings, world.store, world.registry, world.keys, world.suites, driver
        )
        yield Ending(world, driver, launcher, Endings(world.database, world.settings, world.store, launcher, driver))


def damage(world: World, version: AdapterVersion) -> None:
    weights = world.registry.directory(version) / WEIGHTS_FILE
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")


# ---- Keys


async def test_an_evaluators_key_ends_with_its_job(ending: Ending) -> None:
    await ending.world.published()
    job = await ending.running(await ending.evaluation())
    assert await ending.keys() == [f"{job.id} attempt 1"]

    await ending.endings.fail(job, "bad_verdict", "no verdict")

    assert await ending.keys() == []
    assert (await ending.world.job(job)).state is JobState.FAILED


async def test_an_evaluators_key_ends_with_its_attempt_and_not_with_the_next_ones_start(ending: Ending) -> None:
    await ending.world.published()
    job = await ending.running(await ending.evaluation())

    await ending.endings.requeue(job, outcome="crashed", message="trying again")

    assert await ending.keys() == []
    assert (await ending.world.job(job)).state is JobState.QUEUED


async def test_a_cancelled_evaluation_runs_no_more_and_has_no_key(ending: Ending) -> None:
    await ending.world.published()
    job = await ending.running(await ending.evaluation())

    await ending.endings.cancel(job)

    assert await ending.keys() == []
    assert (await ending.driver.status(job.id, 1)).state is ProcessState.LOST
    assert (await ending.world.job(job)).state is JobState.CANCELLED


async def test_the_end_of_one_evaluation_leaves_the_key_of_another(ending: Ending) -> None:
    await ending.world.published(seed=1)
    await ending.world.published(seed=2)
    first, second = [await ending.running(await ending.evaluation(f"support@{n}")) for n in (1, 2)]

    await ending.endings.fail(first, "bad_verdict", "no verdict")

    assert await ending.keys() == [f"{second.id} attempt 1"]


async def test_a_job_that_moved_meanwhile_is_not_ended(ending: Ending) -> None:
    await ending.world.published()
    job = await ending.running(await ending.evaluation())
    await ending.world.service.cancel(job.id, principal=PRINCIPAL)

    with pytest.raises(Conflict, match="look again"):
        await ending.endings.end(job, JobState.SUCCEEDED, outcome="succeeded", result={"late": True})

    found = await ending.world.job(job)
    assert (found.state, found.cancel_requested, found.result) == (JobState.RUNNING, True, None)


# ---- Files


async def test_what_is_evaluated_is_hashed_before_it_is_read(ending: Ending) -> None:
    damage(ending.world, await ending.world.published())

    with pytest.raises(Refused) as caught:
        await ending.running(await ending.evaluation())

    assert caught.value.code == "digest_mismatch"
    assert ending.driver.submitted == []


async def test_what_it_is_held_against_is_hashed_too(ending: Ending) -> None:
    stable, version = await ending.world.published(seed=1), await ending.world.published(seed=2)
    async with ending.world.database.write() as connection:
        await create_route_for(connection, stable)
        await connection.execute(update(tables.routes).values(stable=stable.name))
    damage(ending.world, stable)

    with pytest.raises(Refused, match=stable.digest[:12]):
        await ending.running(await ending.evaluation(version.name))

    assert ending.driver.submitted == []


async def test_what_is_trained_on_from_is_hashed_before_it_is_read(ending: Ending) -> None:
    version = await ending.world.published()
    job = await ending.world.fine_tuning(model=version.name, suffix="support")
    async with ending.world.database.write() as connection:
        job = await ending.world.store.move(connection, job, JobState.QUEUED)
    damage(ending.world, version)

    with pytest.raises(Refused) as caught:
        await ending.running(job)

    assert caught.value.code == "digest_mismatch"
    assert ending.driver.submitted == []


async def refused_file(world: World, **asked: Any) -> Invalid:
    with pytest.raises(Invalid) as caught:
        await world.service.create_fine_tuning(**{"model": world.base.name, "suffix": "support", **asked})
    return caught.value


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
async def test_a_file_that_was_deleted_or_is_another_projects_is_not_trained_on(ending: Ending, param: str) -> None:
    world = ending.world
    kept, gone = await world.upload(), await world.upload(name="other.jsonl")
    await world.files.delete(gone, actor="key:tester", project_id=PRINCIPAL.project_id)
    files = {"training_file": kept} | {param: gone}

    deleted = await refused_file(world, principal=PRINCIPAL, **files)
    anothers = await refused_file(world, principal=STRANGER, training_file=kept)

    assert (deleted.code, deleted.param) == ("file_not_found", param)
    assert (anothers.code, anothers.param) == ("file_not_found", "training_file")
    assert await world.rows(tables.jobs) == []
