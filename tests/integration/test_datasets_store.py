"""Uploaded files: the row and the bytes come together, whatever fails between them."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import database as database_module
from gateway import tables
from gateway.database import Database
from gateway.datasets import store as store_module
from gateway.datasets.store import FileStore
from gateway.errors import GatewayError, StorageFull, Unavailable
from gateway.migrations.run import migrate
from gateway.settings import Settings
from tests.fakes.stack import Stack


class Faulty(Database):
    """Fails a transaction with an error, when it would commit or when it has committed."""

    fault: Exception | None = None
    is_committed = False

    @asynccontextmanager
    async def write(self, **options: Any) -> AsyncIterator[AsyncConnection]:
        async with super().write(**options) as connection:
            yield connection
            if self.fault is not None and not self.is_committed:
                raise self.fault
        if self.fault is not None:
            raise self.fault


@pytest.fixture
async def settings(tmp_path: Path) -> Settings:
    made = Settings(home=tmp_path / "home")
    made.prepare_directories()
    await migrate(made)
    return made


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Faulty]:
    made = Faulty(settings.database)
    yield made
    await made.close()


async def upload(store: FileStore) -> None:
    async def stream() -> AsyncIterator[bytes]:
        yield b"rows\n"

    await store.create(stream(), filename="a", purpose="fine-tune", actor="key:a", project_id="proj_default")


def stored(settings: Settings) -> list[str]:
    return [path.name for path in settings.files_dir.rglob("*") if path.is_file()]


async def rows(database: Database) -> list[str]:
    async with database.read() as connection:
        return list((await connection.execute(tables.files.select())).scalars())


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN; SELECT * FROM files"], ids=["writer", "reader"])
async def test_a_locked_database_keeps_no_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: str) -> None:
    if "SELECT" in lock and sqlite3.sqlite_version_info >= database_module.WAL_SAFE_SINCE:
        pytest.skip("readers hold up no commit where the journal is a write-ahead log")
    monkeypatch.setattr(database_module, "_BUSY_TIMEOUT_MS", 50)
    async with Stack(tmp_path) as stack, stack.client("train") as client:
        other = sqlite3.connect(stack.settings.home / "turnout.db", isolation_level=None)
        for statement in lock.split("; "):
            other.execute(statement).fetchall()

        answer = await client.post("/v1/files", files={"file": ("a", b"rows")}, data={"purpose": "fine-tune"})

        other.close()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_busy")
        assert stored(stack.settings) == []
        assert await rows(stack.database) == []


@pytest.mark.parametrize(
    "fault", [StorageFull("full"), Unavailable("busy", code="database_busy")], ids=["full", "busy"]
)
async def test_a_commit_that_the_database_refused_keeps_no_bytes(
    settings: Settings, database: Faulty, fault: GatewayError
) -> None:
    database.fault = fault

    with pytest.raises(type(fault)):
        await upload(FileStore(database, settings))

    assert stored(settings) == []
    assert await rows(database) == []


async def test_a_row_that_cannot_be_written_keeps_no_bytes(
    settings: Settings, database: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(*args: Any, **fields: Any) -> None:
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(store_module, "record_audit", refused)

    with pytest.raises(ValueError, match="ours"):
        await upload(FileStore(database, settings))

    assert stored(settings) == []


@pytest.mark.parametrize("is_committed", [True, False])
async def test_bytes_stay_while_nobody_knows_whether_their_row_was_written(
    settings: Settings, database: Faulty, *, is_committed: bool
) -> None:
    database.fault, database.is_committed = Unavailable("the connection broke", code="database_lost"), is_committed
    store = FileStore(database, settings)

    with pytest.raises(Unavailable):
        await upload(store)

    (kept,) = stored(settings)
    assert await rows(database) == ([kept] if is_committed else [])
    long_ago = time.time() - 2 * store_module._ABANDONED_AFTER_S
    os.utime(store.path(kept), (long_ago, long_ago))
    assert await store.sweep() == (0 if is_committed else 1)
    assert stored(settings) == ([kept] if is_committed else [])
