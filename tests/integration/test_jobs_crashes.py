"""The controller may die at any point: whatever comes after it ends the same way, once."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import tables
from gateway.jobs.local import LocalJobs
from gateway.jobs.models import JobKind, JobState, ProcessSpec, ProcessState, ProcessStatus
from gateway.jobs.workdir import WorkDirectory
from gateway.processes import look_at
from gateway.registry.models import VersionState
from tests.fakes.jobs import FakeJobs
from tests.jobs_world import PRINCIPAL, World, a_world, run_to_end, tick_until


class PowerCut(BaseException):
    """Ends a controller where no code can catch it."""


def at_once(world: World) -> FakeJobs:
    """A driver whose programs finish before `submit` returns."""

    def run(spec: ProcessSpec) -> ProcessStatus:
        work = WorkDirectory(Path(spec.output))
        found = work.spec()
        work.say("step", loss=0.5)
        if "config" in found:
            shutil.copytree(world.bundle, work.path / "bundle")
            work.finish(found["token"], ok=True, data={"trained_tokens": 10, "metrics": {}})
        elif "suite_dir" in found:
            data = {"verdict": "passed", "reason": "good", "fingerprint": "f" * 64, "report": {}, "looks": 1}
            work.finish(found["token"], ok=True, data=data)
        else:
            reference = {"digest": found["digest"], "prompts": [{}]}
            (work.path / "reference.json").write_text(json.dumps(reference))
            work.finish(found["token"], ok=True)
        return ProcessStatus(state=ProcessState.SUCCEEDED, exit_code=0)

    return FakeJobs(run)


class Fuse:
    """Cuts the power before or after the n-th commit; never, with `at` None."""

    def __init__(self, world: World, monkeypatch: pytest.MonkeyPatch, *, at: int | None, after: bool) -> None:
        self.writes = 0
        self._at = at
        self._after = after
        self._write = world.database.write
        monkeypatch.setattr(world.database, "write", self.write)

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        return self._blown()

    @asynccontextmanager
    async def _blown(self) -> AsyncIterator[AsyncConnection]:
        self.writes += 1
        now = self.writes == self._at
        async with self._write() as connection:
            yield connection
            if now and not self._after:
                raise PowerCut
        if now:
            raise PowerCut


async def tick_through(world: World, driver: FakeJobs, job_id: str) -> int:
    """New controllers until the job is final; returns how many died."""
    cuts = 0
    reconciler = world.reconciler(driver=driver)
    for _ in range(60):
        if (await world.job(job_id)).state.is_final:
            return cuts
        try:
            await reconciler.tick()
        except PowerCut:
            cuts += 1
            reconciler = world.reconciler(driver=driver)
    raise AssertionError(f"{job_id} never ended: {await world.job(job_id)}")


async def writes_of(tmp_path: Path, kind: JobKind) -> int:
    with pytest.MonkeyPatch.context() as patch:
        async with a_world(tmp_path / "undisturbed") as world:
            job_id = await a_job(world, kind)
            fuse = Fuse(world, patch, at=None, after=False)
            await tick_through(world, at_once(world), job_id)
            return fuse.writes


async def a_job(world: World, kind: JobKind) -> str:
    if kind is JobKind.FINE_TUNING:
        return (await world.fine_tuning()).id
    await world.published()
    return (await world.service.create_evaluation("support@1", "emails", principal=PRINCIPAL))[0].id


async def check_fine_tuning(world: World, job_id: str) -> None:
    job = await world.job(job_id)
    assert job.state is JobState.SUCCEEDED
    assert job.result is not None
    assert job.result["fine_tuned_model"] == "support@1"
    versions = await world.registry.versions()
    assert [(version.name, version.state, version.job_id) for version in versions] == [
        ("support@1", VersionState.VERIFIED, job_id)
    ]
    world.registry.verify_files(versions[0])
    assert (world.settings.references_dir / f"{versions[0].digest}.json").is_file()


async def check_evaluation(world: World, job_id: str) -> None:
    assert (await world.job(job_id)).state is JobState.SUCCEEDED
    [verdict] = await world.rows(tables.verdicts)
    assert (verdict["verdict"], verdict["looks"]) == ("passed", 1)
    assert await world.rows(tables.api_keys) == []


@pytest.mark.invariant(10)
@pytest.mark.parametrize("kind", [JobKind.FINE_TUNING, JobKind.EVALUATION])
async def test_a_cut_at_any_commit_changes_nothing_of_the_outcome(tmp_path: Path, kind: JobKind) -> None:
    writes = await writes_of(tmp_path, kind)
    assert writes >= 5

    for at in range(1, writes + 1):
        for after in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                async with a_world(tmp_path / f"cut-{at}-{after}") as world:
                    job_id = await a_job(world, kind)
                    Fuse(world, patch, at=at, after=after)

                    cuts = await tick_through(world, at_once(world), job_id)

                    assert cuts == 1
                    await (check_fine_tuning if kind is JobKind.FINE_TUNING else check_evaluation)(world, job_id)
                    assert not [row for row in await world.rows(tables.job_attempts) if row["outcome"] == "crashed"]


@pytest.mark.invariant(10)
async def test_a_cut_between_the_bundle_and_its_row_publishes_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with a_world(tmp_path / "home") as world:
        job = await world.fine_tuning()
        record = world.registry._record
        monkeypatch.setattr(world.registry, "_record", cut)
        with pytest.raises(PowerCut):
            await run_to_end(world, world.reconciler(driver=(driver := at_once(world))), job)
        assert await world.registry.versions() == []

        monkeypatch.setattr(world.registry, "_record", record)
        await tick_through(world, driver, job.id)

        await check_fine_tuning(world, job.id)


async def cut(*_: Any, **__: Any) -> Any:
    raise PowerCut


@pytest.mark.invariant(10)
async def test_a_controller_killed_in_the_middle_of_a_job_is_followed_by_one_that_adopts_it(tmp_path: Path) -> None:
    async with a_world(tmp_path / "home") as world:
        world.order(JobKind.FINE_TUNING, {"do": "hang"})
        job = await world.fine_tuning()
        argv = [sys.executable, "-m", "tests.fakes.controller", str(world.settings.home), str(world.orders)]
        first = subprocess.Popen(argv, cwd=Path(__file__).parents[2])
        while not world.has_started(job):
            assert first.poll() is None
            await asyncio.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
        pid = world.seen(job)["pid"]
        assert look_at(pid) is not None

        processes = world.processes()
        adopted = await processes.adopt()
        reconciler = world.reconciler(processes=processes)
        await reconciler.tick()
        assert [child.pid for child in adopted] == [pid]
        assert (await world.job(job)).state is JobState.RUNNING

        (world.orders / "release").touch()
        ended = await run_to_end(world, reconciler, job)
        assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 1)
        assert await world.rows(tables.processes) == []


@pytest.mark.invariant(10)
async def test_a_job_that_died_with_its_controller_is_started_again(tmp_path: Path) -> None:
    async with a_world(tmp_path / "home") as world:
        world.order(JobKind.FINE_TUNING, {"do": "hang"}, {"do": "finish"})
        job = await world.fine_tuning()
        first = world.processes()

        async def started() -> bool:
            return world.has_started(job)

        await tick_until(world.reconciler(processes=first), started)
        await first.kill(f"{job.id}.1", 0.0)

        second = world.processes()
        assert await second.adopt() == []
        ended = await run_to_end(world, world.reconciler(processes=second), job)

        assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 2)


async def test_stopping_the_server_does_not_use_up_a_jobs_attempts(tmp_path: Path) -> None:
    async with a_world(tmp_path / "home", max_attempts=1) as world:
        world.order(JobKind.FINE_TUNING, {"do": "hang"}, {"do": "hang"}, {"do": "finish"})
        job = await world.fine_tuning()
        for attempt in (1, 2):
            processes = world.processes()
            reconciler = world.reconciler(processes=processes)

            async def started(attempt: int = attempt) -> bool:
                return world.has_started(job, attempt)

            await tick_until(reconciler, started)
            await processes.stop_all(grace_s=0.1)

        ended = await run_to_end(world, world.reconciler(), job)

        assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 3)


async def test_an_attempt_that_is_lost_again_and_again_is_given_up(tmp_path: Path) -> None:
    async with a_world(tmp_path / "home", max_attempts=1) as world:
        job = await world.fine_tuning()

        ended = await run_to_end(world, world.reconciler(driver=Nowhere()), job)

        assert (ended.state, ended.error_code, ended.attempt) == (JobState.FAILED, "crashed", 11)


class Nowhere:
    """A driver whose attempts vanish."""

    async def submit(self, spec: ProcessSpec) -> None:
        return

    async def status(self, job_id: str, attempt: int) -> ProcessStatus:
        return ProcessStatus(state=ProcessState.LOST)

    async def cancel(self, job_id: str, attempt: int) -> None:
        return


async def test_leftovers_of_ended_jobs_are_swept_at_the_start(tmp_path: Path) -> None:
    async with a_world(tmp_path / "home") as world:
        job = await run_to_end(world, world.reconciler(), await world.fine_tuning())
        (world.attempt_dir(job) / "bundle").mkdir()
        (world.settings.jobs_dir / job.id / "checkpoints" / "step-1").mkdir(parents=True)
        await world.keys.create(f"{job.id} attempt 1", ["evaluate"], actor="controller")
        left, _ = await world.keys.create(f"{job.id} attempt 2", ["evaluate"], actor="controller")
        await world.keys.revoke(left.id, "key:tester")
        mine, _ = await world.keys.create("mine", ["evaluate"], actor="key:tester")
        await world.keys.revoke(mine.id, "key:tester")
        admins, _ = await world.keys.create(f"{job.id} attempt 3", ["evaluate"], actor="key:tester")

        await world.reconciler().tick()

        assert not (world.attempt_dir(job) / "bundle").exists()
        assert not (world.settings.jobs_dir / job.id / "checkpoints").exists()
        assert {key["id"] for key in await world.rows(tables.api_keys)} == {mine.id, admins.id}


# ---- both drivers keep the same promises ----


@pytest.mark.parametrize("kind", ["local", "fake"])
async def test_an_attempt_is_started_once_and_cancelled_for_good(tmp_path: Path, kind: str) -> None:
    async with a_world(tmp_path / "home") as world:
        output = tmp_path / "out"
        output.mkdir()
        code = "import pathlib, time; pathlib.Path('ran').open('a').write('x'); time.sleep(60)"
        spec = ProcessSpec(
            job_id="ftjob-1",
            attempt=1,
            argv=(sys.executable, "-c", code),
            env={"PATH": "/usr/bin"},
            output=str(output),
            timeout_s=60,
        )

        def run(found: ProcessSpec) -> ProcessStatus:
            with (Path(found.output) / "ran").open("a") as file:
                file.write("x")
            return ProcessStatus(state=ProcessState.RUNNING)

        driver = LocalJobs(world.processes(), grace_s=0.2) if kind == "local" else FakeJobs(run)
        assert (await driver.status("ftjob-1", 1)).state is ProcessState.LOST
        await driver.submit(spec)
        await driver.submit(spec)
        assert (await driver.status("ftjob-1", 1)).state is ProcessState.RUNNING
        while not (output / "ran").exists() or not (output / "ran").read_text():
            await asyncio.sleep(0.01)

        await driver.cancel("ftjob-1", 1)
        await driver.cancel("ftjob-1", 1)

        assert (await driver.status("ftjob-1", 1)).state is ProcessState.LOST
        assert (output / "ran").read_text() == "x"


async def test_an_attempt_that_outlives_its_time_is_ended(tmp_path: Path) -> None:
    async with a_world(tmp_path / "home") as world:
        driver = LocalJobs(world.processes(), grace_s=0.2)
        output = tmp_path / "out"
        output.mkdir()
        argv = (sys.executable, "-c", "import time; time.sleep(60)")
        await driver.submit(ProcessSpec(job_id="j", attempt=1, argv=argv, env={}, output=str(output), timeout_s=0.0))

        assert (await driver.status("j", 1)).state is ProcessState.FAILED
        assert (await world.processes().status("j.1")).state == "absent"
