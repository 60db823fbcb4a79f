"""Transactions on a real SQLite file: whole or not at all, one writer at a time, one state for a reader."""

from __future__ import annotations

import asyncio
import itertools
import random
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError

from gateway import database as module
from gateway.database import Database, bump_revision, read_revision
from gateway.errors import Unavailable
from gateway.ids import new_id


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite+aiosqlite:///{tmp_path / 'state.db'}")
    async with database.write() as connection:
        await connection.execute(text("CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL)"))
        await connection.execute(text("CREATE TABLE revisions (name TEXT PRIMARY KEY, value INTEGER NOT NULL)"))
        await connection.execute(text("INSERT INTO counter VALUES ('a', 0), ('b', 0)"))
    yield database
    await database.close()


async def values(database: Database) -> dict[str, int]:
    async with database.read() as connection:
        return {row.name: row.value for row in await connection.execute(text("SELECT name, value FROM counter"))}


async def add_one(database: Database) -> None:
    """Read, wait, write: loses updates unless writers take turns."""
    async with database.write() as connection:
        value = (await connection.execute(text("SELECT value FROM counter WHERE name = 'a'"))).scalar_one()
        await asyncio.sleep(0)
        await connection.execute(text("UPDATE counter SET value = :value WHERE name = 'a'"), {"value": value + 1})


async def test_a_write_is_seen_after_it_ends_and_by_another_process(database: Database, tmp_path: Path) -> None:
    await add_one(database)

    with closing(sqlite3.connect(tmp_path / "state.db")) as other:
        assert other.execute("SELECT value FROM counter WHERE name = 'a'").fetchone() == (1,)


async def test_an_error_undoes_the_whole_write(database: Database) -> None:
    async def half() -> None:
        async with database.write() as connection:
            await connection.execute(text("UPDATE counter SET value = 7 WHERE name = 'a'"))
            await connection.execute(text("INSERT INTO counter VALUES ('b', 0)"))

    with pytest.raises(IntegrityError):
        await half()

    assert await values(database) == {"a": 0, "b": 0}


async def test_a_schema_change_is_undone_with_its_transaction(database: Database) -> None:
    async def half() -> None:
        async with database.write() as connection:
            await connection.execute(text("CREATE TABLE later (id INTEGER)"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await half()

    with pytest.raises(OperationalError, match="no such table"):
        async with database.read() as connection:
            await connection.execute(text("SELECT * FROM later"))


async def test_writers_take_turns(database: Database) -> None:
    await asyncio.gather(*(add_one(database) for _ in range(50)))

    assert (await values(database))["a"] == 50


async def test_writers_of_two_connections_pools_take_turns(database: Database) -> None:
    other = Database(database.url)
    try:
        await asyncio.gather(*(add_one(each) for _ in range(15) for each in (database, other)))
    finally:
        await other.close()

    assert (await values(database))["a"] == 30


async def test_a_reader_sees_one_state_throughout(database: Database) -> None:
    async def move() -> None:
        async with database.write() as connection:
            await connection.execute(text("UPDATE counter SET value = 1"))

    async with database.read() as connection:
        before = (await connection.execute(text("SELECT value FROM counter WHERE name = 'a'"))).scalar_one()
        writer = asyncio.create_task(move())
        await asyncio.sleep(0.05)
        after = (await connection.execute(text("SELECT value FROM counter WHERE name = 'b'"))).scalar_one()
    await writer

    assert (before, after) == (0, 0)
    assert await values(database) == {"a": 1, "b": 1}


async def test_a_write_inside_a_read_is_a_mistake_told_at_once(database: Database) -> None:
    async def nested() -> None:
        async with database.read(), database.write():
            pass

    async def twice() -> None:
        async with database.write(), database.write():
            pass

    for wrong in (nested, twice):
        with pytest.raises(RuntimeError, match="wait for itself"):
            await wrong()
    await add_one(database)


async def test_cancelling_at_any_moment_leaves_all_or_nothing_and_no_lock(database: Database) -> None:
    choose = random.Random(1)

    async def both() -> None:
        async with database.write() as connection:
            await connection.execute(text("UPDATE counter SET value = value + 1 WHERE name = 'a'"))
            await connection.execute(text("UPDATE counter SET value = value + 1 WHERE name = 'b'"))

    for _ in range(60):
        tasks = [asyncio.create_task(both()) for _ in range(3)]
        await asyncio.sleep(choose.random() * 0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        found = await values(database)
        assert found["a"] == found["b"]

    before = (await values(database))["a"]
    await add_one(database)
    assert (await values(database))["a"] == before + 1


@pytest.mark.invariant(10)
@pytest.mark.parametrize("kind", ["write", "read"])
async def test_cancelled_in_the_middle_of_a_statement_no_lock_stays(
    database: Database, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(module, "_BUSY_TIMEOUT_MS", 500)
    other = Database(database.url)
    is_running, may_end, loop = asyncio.Event(), threading.Event(), asyncio.get_running_loop()

    def linger() -> int:
        loop.call_soon_threadsafe(is_running.set)
        may_end.wait(10)
        return 7

    async def ask() -> None:
        async with database.write() if kind == "write" else database.read() as connection:
            raw = (await connection.get_raw_connection()).driver_connection
            assert raw is not None
            await raw.create_function("linger", 0, linger)
            change = "UPDATE counter SET value = linger() RETURNING value"
            await connection.execute(text(change if kind == "write" else "SELECT value, linger() FROM counter"))

    task = asyncio.create_task(ask())
    await is_running.wait()
    task.cancel()
    loop.call_soon(may_end.set)
    with pytest.raises(asyncio.CancelledError):
        await task

    await add_one(other)
    assert await values(other) == {"a": 1, "b": 0}
    await other.close()


async def test_a_lock_held_elsewhere_is_reported_as_busy(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BUSY_TIMEOUT_MS", 200)
    impatient = Database(database.url)
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable) as caught:
            await add_one(impatient)
        other.execute("ROLLBACK")
    await add_one(impatient)
    await impatient.close()

    assert caught.value.code == "database_busy"
    assert (await values(database))["a"] == 1


async def test_a_database_that_was_moved_away_is_lost_not_empty(database: Database, tmp_path: Path) -> None:
    file = tmp_path / "state.db"
    file.rename(tmp_path / "elsewhere.db")

    for attempt in (values, add_one):
        with pytest.raises(Unavailable) as caught:
            await attempt(database)
        assert caught.value.code == "database_lost"
    assert not file.exists()

    (tmp_path / "elsewhere.db").rename(file)
    assert await values(database) == {"a": 0, "b": 0}


async def test_a_commit_is_flushed_to_the_disk(database: Database) -> None:
    async with database.read() as connection:
        synchronous = (await connection.execute(text("PRAGMA synchronous"))).scalar_one()
        journal = (await connection.execute(text("PRAGMA journal_mode"))).scalar_one()

    assert synchronous == 2  # FULL
    assert journal == ("wal" if sqlite3.sqlite_version_info >= (3, 51, 3) else "truncate")


async def test_the_revision_counts_every_change(database: Database) -> None:
    seen = []
    for _ in range(3):
        async with database.write() as connection:
            seen.append(await bump_revision(connection))
    async with database.read() as connection:
        seen.append(await read_revision(connection))

    assert seen == [1, 2, 3, 3]


def test_ids_sort_by_time_and_do_not_repeat() -> None:
    ids = []
    for _ in range(5):
        ids.append([new_id("x-") for _ in range(200)])
        time.sleep(0.002)

    assert all(max(earlier) < min(later) for earlier, later in itertools.pairwise(ids))
    assert len({each for group in ids for each in group}) == 1000
