"""A controller that was stopped in the middle of a step and woken after another had taken over: it changes nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from gateway import tables
from gateway.database import Database
from gateway.jobs.models import JobKind, JobState
from gateway.lease import Lease, LeaseLost
from gateway.processes import MARK_VARIABLE, ProcessTable, home_marker, look_at
from gateway.registry.models import VersionState
from gateway.supervisor import settings_environment
from tests.jobs_world import World, a_world

ROOT = Path(__file__).parents[2]
SLEEP = "import time; time.sleep(60)"


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path / "home") as found:
        yield found


class Controllers:
    """Controllers over one home."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        """One more, and its log."""
        path = self._world.orders / f"controller-{len(self._started)}.log"
        argv = [sys.executable, "-m", "tests.fakes.sleepy_controller", str(self._world.settings.home)]
        with path.open("wb") as output:
            process = subprocess.Popen(
                [*argv, str(self._world.orders), *arguments],
                env=os.environ | settings_environment(self._world.settings),
                cwd=ROOT,
                stdout=output,
                stderr=output,
            )
        self._started.append(process)
        return process, path

    async def end(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()


@pytest.fixture
async def controllers(world: World) -> AsyncIterator[Controllers]:
    made = Controllers(world)
    try:
        yield made
    finally:
        await made.end()


async def until(look: Callable[[], Awaitable[bool]], what: str, log: Path | None = None) -> None:
    deadline = time.monotonic() + 40
    while not await look():
        assert time.monotonic() < deadline, f"{what}: not in time\n{log.read_text()[-3000:] if log else ''}"
        await asyncio.sleep(0.02)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def marks(world: World) -> set[str]:
    """Marks of the living children of this home: `verify-...:1`."""
    begin = f"{MARK_VARIABLE}={home_marker(world.settings.home)}:".encode()
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            entries = path.read_bytes().split(b"\0")
        except OSError:
            continue
        found |= {entry.removeprefix(begin).decode() for entry in entries if entry.startswith(begin)}
    return found


@pytest.mark.invariant(10)
@pytest.mark.parametrize("point", ["spawn", "popen"])
async def test_an_attempt_is_not_started_by_a_controller_that_slept_through_its_lease(
    world: World, controllers: Controllers, point: str
) -> None:
    world.order(JobKind.VERIFY, {"do": "hang"})
    version = await world.published(state=VersionState.RECEIVED)
    first, first_log = controllers.start(point)

    async def asleep() -> bool:
        return is_stopped(first.pid)

    await until(asleep, "the first stops itself", first_log)
    _, second_log = controllers.start()

    async def followed() -> bool:
        jobs = await world.store.unfinished()
        return bool(jobs) and jobs[0].attempt == 2 and world.has_started(jobs[0], 2)

    await until(followed, "the second starts another attempt", second_log)
    (job,) = await world.store.unfinished()
    os.kill(first.pid, signal.SIGCONT)

    async def yielded() -> bool:
        return "no longer acting" in first_log.read_text()

    await until(yielded, "the first stops acting", first_log)

    async def alone() -> bool:
        return marks(world) == {f"{job.id}.2:2"}

    await until(alone, "the second's attempt is the only one", first_log)
    assert [row["id"] for row in await world.rows(tables.processes)] == [f"{job.id}.2"]
    if point == "spawn":  # a process that exists already lives until its row is refused: some milliseconds
        assert not world.has_started(job, 1)
    (world.orders / "release").touch()

    async def verified() -> bool:
        return (await world.job(job)).state is JobState.SUCCEEDED

    await until(verified, "the second's attempt succeeds", second_log)
    assert [row["outcome"] for row in await world.rows(tables.job_attempts)] == ["lost", "succeeded"]
    assert (await world.registry.version(version.name)).state is VersionState.VERIFIED


# ---- The fence itself ----------------------------------------------------------------------------------------------


@pytest.fixture
async def fenced(world: World) -> AsyncIterator[tuple[Database, Lease]]:
    """A controller's own database, with the lease."""
    database = Database(world.settings.database)
    lease = Lease(database, holder="elsewhere/1/0")
    database.fence_with(lease.fence)
    await lease.acquire()
    yield database, lease
    await database.close()


async def take_over(world: World) -> None:
    """Another controller takes the lease, as after a long silence of its holder."""
    async with world.database.write() as connection:
        await connection.execute(tables.leases.update().values(holder="elsewhere/2/0", epoch=tables.leases.c.epoch + 1))


@pytest.mark.invariant(10)
async def test_no_write_gets_through_after_another_took_over(world: World, fenced: tuple[Database, Lease]) -> None:
    database, _ = fenced
    async with database.write() as connection:
        await connection.execute(tables.revisions.insert().values(name="mine", value=1))

    await take_over(world)

    with pytest.raises(LeaseLost):
        async with database.write() as connection:
            await connection.execute(tables.revisions.update().values(value=2))
    assert {"name": "mine", "value": 1} in await world.rows(tables.revisions)


async def test_before_the_lease_is_ours_nothing_is_written(world: World) -> None:
    database = Database(world.settings.database)
    database.fence_with(Lease(database).fence)

    with pytest.raises(LeaseLost):
        async with database.write():
            pass
    await database.close()


@pytest.mark.invariant(10)
async def test_no_child_is_ended_or_started_after_another_took_over(
    world: World, fenced: tuple[Database, Lease]
) -> None:
    table = ProcessTable(fenced[0], home_marker(world.settings.home))
    place = {"env": {}, "cwd": world.settings.home, "log": world.settings.logs_dir / "x.log"}
    pid = await table.spawn("child", kind="job", argv=[sys.executable, "-c", SLEEP], **place)  # type: ignore[arg-type]

    await take_over(world)

    with pytest.raises(LeaseLost):
        await table.kill("child")
    with pytest.raises(LeaseLost):
        await table.forget("child")
    async with world.database.write() as connection:
        await connection.execute(tables.processes.delete())  # as if it were an orphan
    with pytest.raises(LeaseLost):
        await table.adopt()
    with pytest.raises(LeaseLost):
        await table.spawn("other", kind="job", argv=[sys.executable, "-c", SLEEP], **place)  # type: ignore[arg-type]
    seen = look_at(pid)
    assert seen is not None
    assert not seen.is_zombie
    assert marks(world) == {"child:1"}
