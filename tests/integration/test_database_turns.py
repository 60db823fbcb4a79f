"""Who writes next: moves of traffic before everything else, in this process and beside others, and never for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from gateway import database as module
from gateway import turns
from gateway.database import Database
from gateway.errors import Unavailable
from gateway.turns import Hurry, Turns
from tests.fakes.stack import until

ROOT = Path(__file__).resolve().parents[2]
IN_A_HURRY = """
import sys, time
from pathlib import Path
from gateway.turns import Hurry
with Hurry(Path(sys.argv[1])).shown():
    print("shown", flush=True)
    time.sleep(600)
"""


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'state.db'}")
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL)"))
        await connection.execute(text("INSERT INTO counter VALUES ('a', 0), ('b', 0)"))
    yield database
    await database.close()


async def add_one(database: Database, *, urgent: bool = False) -> None:
    async with database.write(urgent=urgent) as connection:
        await connection.execute(text("UPDATE counter SET value = value + 1 WHERE name = 'a'"))


async def value(database: Database, name: str) -> int:
    async with database.read() as connection:
        found = await connection.execute(text("SELECT value FROM counter WHERE name = :name"), {"name": name})
        return int(found.scalar_one())


@contextmanager
def process(*argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that has said its first line."""
    with subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline()
        try:
            yield started
        finally:
            started.kill()


# ---- Readers


async def test_a_move_outwaits_a_reader_that_ordinary_writes_give_up_on(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_TIMEOUT_MS", 100)
    impatient = Database(database.url)
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT value FROM counter").fetchall()
        with pytest.raises(Unavailable, match="busy"):
            await add_one(impatient)

        move = asyncio.create_task(add_one(impatient, urgent=True))
        with pytest.raises(Unavailable, match="busy"):
            await add_one(impatient)
        assert not move.done()
        reader.execute("COMMIT")
        await move
    await impatient.close()

    assert await value(database, "a") == 1


async def test_a_move_ends_too_when_the_lock_is_never_let_go(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_URGENT_TIMEOUT_MS", 200)
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable) as caught:
            await add_one(database, urgent=True)
        other.execute("ROLLBACK")
    await add_one(database)

    assert caught.value.code == "database_busy"
    assert await value(database, "a") == 1


async def test_a_move_has_a_connection_while_others_wait_on_all_of_them(database: Database, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        readers = [asyncio.create_task(value(database, "a")) for _ in range(40)]
        await until(lambda: database.engine.pool.checkedout() == 15)  # type: ignore[attr-defined]
        move = asyncio.create_task(add_one(database, urgent=True))
        await until(lambda: database._mover.pool.checkedout() == 1)  # type: ignore[attr-defined]
        other.execute("ROLLBACK")
    await asyncio.gather(*readers, move)

    assert await value(database, "a") == 1


# ---- In this process


async def test_a_move_goes_before_all_that_waits(database: Database) -> None:
    order: list[str] = []

    async def write(name: str, *, urgent: bool = False) -> None:
        async with database.write(urgent=urgent):
            order.append(name)

    async with database.write():
        waiting = [asyncio.create_task(write(f"job {number}")) for number in range(20)]
        await asyncio.sleep(0)
        moves = [asyncio.create_task(write(f"move {number}", urgent=True)) for number in range(2)]
        await asyncio.sleep(0)
    await asyncio.gather(*waiting, *moves)

    assert order == ["move 0", "move 1", *(f"job {number}" for number in range(20))]


async def test_a_turn_that_comes_to_one_who_left_goes_to_the_next() -> None:
    turn = Turns()
    await turn.acquire()
    first, second, third = (asyncio.create_task(turn.acquire(urgent=urgent)) for urgent in (True, True, False))
    await asyncio.sleep(0)
    first.cancel()  # while it waits
    await asyncio.sleep(0)

    turn.release()
    second.cancel()  # at the very moment at which it gets it
    await asyncio.wait([first, second], timeout=5)
    await asyncio.wait_for(third, 5)

    assert first.cancelled()
    assert second.cancelled()


# ---- Beside other processes


async def test_another_process_that_writes_all_the_time_stands_back_for_each_move(database: Database) -> None:
    between = []
    with process("-m", "tests.fakes.busy_writer", database.url):
        for _ in range(15):
            written = await value(database, "b")
            await add_one(database, urgent=True)
            between.append(await value(database, "b") - written)
            await asyncio.sleep(0.03)

    assert await value(database, "a") == 15
    # The one that it was in, one that it began before the sign was there, and one between the move and our look.
    assert max(between) <= 3


async def test_who_is_killed_in_a_hurry_holds_nobody_up(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "state.db"
    hurry = Hurry(file)
    with process("-c", IN_A_HURRY, str(file)) as other:
        assert hurry.is_shown_by_another()
        other.send_signal(signal.SIGKILL)
        other.wait()

        assert not hurry.is_shown_by_another()
    await add_one(database)
    hurry.close()


async def test_who_is_stopped_in_a_hurry_holds_others_up_for_a_while_only(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "STAND_BACK_S", 0.3)
    with process("-c", IN_A_HURRY, str(tmp_path / "state.db")) as other:
        os.kill(other.pid, signal.SIGSTOP)
        await add_one(database)
        await add_one(database, urgent=True)
        await add_one(database)

    assert await value(database, "a") == 3


def test_the_sign_is_seen_by_others_only_and_ends_with_the_last_of_ours(tmp_path: Path) -> None:
    ours, theirs = Hurry(tmp_path / "state.db"), Hurry(tmp_path / "state.db")

    with ours.shown():
        with ours.shown():
            assert theirs.is_shown_by_another()
        assert theirs.is_shown_by_another()
        assert not ours.is_shown_by_another()
    assert not theirs.is_shown_by_another()

    for each in (ours, theirs):
        each.close()


def test_without_the_file_nobody_stands_back_and_nothing_fails(tmp_path: Path) -> None:
    hurry = Hurry(tmp_path / "gone" / "state.db")

    with hurry.shown():
        assert not hurry.is_shown_by_another()
