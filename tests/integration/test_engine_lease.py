"""The controller's lease, on a real database and with clocks that the test turns."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import update

from gateway import lease as module
from gateway import tables
from gateway.database import Database
from gateway.ids import now
from gateway.lease import EXPIRE_S, Lease, LeaseLost, identity, is_gone
from gateway.migrations.run import migrate
from gateway.settings import Settings


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    settings = Settings(home=tmp_path / "home")
    settings.prepare_directories()
    await migrate(settings)
    opened = Database(settings.database)
    yield opened
    await opened.close()


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.01)


def a_lease(database: Database, holder: str, clock: Clock) -> Lease:
    return Lease(database, holder=f"elsewhere/{holder}/0", clock=clock)


async def gets_it(lease: Lease, within_s: float = 10.0) -> bool:
    try:
        await asyncio.wait_for(lease.acquire(), within_s)
    except TimeoutError:
        return False
    return True


async def waits(lease: Lease) -> bool:
    """Whether it is still waiting after many looks."""
    return not await gets_it(lease, 0.3)


async def test_the_first_gets_it_and_the_second_waits(database: Database) -> None:
    clock = Clock()
    first, second = a_lease(database, "1", clock), a_lease(database, "2", clock)

    assert await gets_it(first)
    assert await waits(second)
    assert (first.is_held, second.is_held) == (True, False)


async def test_a_silent_holder_is_followed_with_a_higher_epoch_and_fenced(database: Database) -> None:
    clock = Clock()
    first, second = a_lease(database, "1", clock), a_lease(database, "2", clock)
    await first.acquire()
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(0.1)
    assert not waiting.done()

    clock.now += EXPIRE_S + 1
    await asyncio.wait_for(waiting, 5)

    assert second.epoch == first.epoch + 1
    assert not first.is_held
    with pytest.raises(LeaseLost):
        await first.renew()
    with pytest.raises(LeaseLost):
        first.check()
    assert second.is_held


async def test_a_holder_that_renews_keeps_it(database: Database) -> None:
    clock, late = Clock(), Clock()
    first, second = a_lease(database, "1", clock), a_lease(database, "2", late)
    await first.acquire()
    waiting = asyncio.create_task(second.acquire())

    for _ in range(4):
        await asyncio.sleep(0.05)
        clock.now += 3
        late.now += 3
        await first.renew()
    await asyncio.sleep(0.05)

    assert not waiting.done()
    assert first.is_held
    waiting.cancel()
    await asyncio.wait([waiting])  # before the database is closed under it


async def test_a_holder_that_slept_too_long_stops_even_if_nobody_followed(database: Database) -> None:
    clock = Clock()
    first = a_lease(database, "1", clock)
    await first.acquire()

    clock.now += EXPIRE_S

    with pytest.raises(LeaseLost):
        await first.renew()


@pytest.mark.parametrize("days", [-1, 1])
async def test_wall_clocks_decide_nothing(database: Database, days: int) -> None:
    from datetime import timedelta

    clock = Clock()
    first, second = a_lease(database, "1", clock), a_lease(database, "2", clock)
    await first.acquire()
    async with database.write() as connection:
        await connection.execute(update(tables.leases).values(expires_at=now() + timedelta(days=days)))

    assert await waits(second)
    await first.renew()
    assert first.is_held


async def test_released_it_is_free_at_once(database: Database) -> None:
    clock = Clock()
    first, second = a_lease(database, "1", clock), a_lease(database, "2", clock)
    await first.acquire()

    await first.release()

    assert not first.is_held
    assert await gets_it(second)


async def test_a_dead_holder_of_this_machine_is_followed_at_once(database: Database) -> None:
    process = await asyncio.create_subprocess_exec("sleep", "30")
    first = Lease(database, holder=identity(process.pid))
    await first.acquire()
    assert await waits(Lease(database, holder="elsewhere/2/0"))

    process.kill()
    await process.wait()

    assert await gets_it(Lease(database, holder="elsewhere/2/0"))


async def test_who_let_it_run_out_takes_it_again_without_waiting_for_itself(database: Database) -> None:
    clock = Clock()
    first = a_lease(database, "1", clock)
    await first.acquire()
    epoch = first.epoch
    clock.now += EXPIRE_S
    with pytest.raises(LeaseLost):
        await first.renew()

    assert await gets_it(first)  # the clock stands still: waiting would never end

    assert first.epoch == epoch + 1
    assert first.is_held


async def test_a_renewal_goes_before_the_own_writes_that_wait(database: Database) -> None:
    lease = a_lease(database, "1", Clock())
    await lease.acquire()
    order: list[str] = []

    async def write() -> None:
        async with database.write():
            order.append("write")

    async def renew() -> None:
        await lease.renew()
        order.append("renewal")

    async with database.write():
        tasks = [asyncio.create_task(write()) for _ in range(5)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(renew()))
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)

    assert order[:2].count("renewal") == 1  # the block's end may come before or after a first write's


async def test_of_many_at_once_one_gets_it(database: Database) -> None:
    clock = Clock()
    rivals = [a_lease(database, str(number), clock) for number in range(8)]

    won = await asyncio.gather(*(gets_it(rival, 1.0) for rival in rivals))

    assert sum(won) == 1


def test_who_is_gone() -> None:
    assert not is_gone(identity())
    assert is_gone(identity().rpartition("/")[0] + "/1.5"), "the pid is another process's now"
    assert is_gone("")
    assert not is_gone(f"another-machine/{os.getpid()}/1.5")
