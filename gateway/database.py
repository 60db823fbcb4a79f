"""The one SQL database: connections, transactions, ids, time, the audit log."""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import event, insert, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from . import tables
from .errors import StorageFull, Unavailable

DEFAULT_PROJECT = "proj_default"
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
# Two processes writing one WAL file can corrupt it on SQLite older than this (sqlite.org/wal.html#walresetbug).
_WAL_SAFE_SINCE = (3, 51, 3)
_BUSY_TIMEOUT_MS = 5_000


def now() -> datetime:
    """Wall time in UTC, for records; never for durations."""
    return datetime.now(UTC)


def new_id(prefix: str) -> str:
    """A time-ordered id such as `ftjob-06ahq5...`: 48 bits of milliseconds, then 60 random bits, in base 32."""
    value = (int(time.time() * 1000) << 60) | secrets.randbits(60)
    digits = []
    for _ in range(22):
        value, digit = divmod(value, 32)
        digits.append(_ALPHABET[digit])
    return f"{prefix}{''.join(reversed(digits))}"


class Database:
    """Connections to the state. `read` sees committed data; `write` is one transaction, serialised on SQLite."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        self.engine: AsyncEngine = create_async_engine(url, pool_pre_ping=not self.is_sqlite)
        if self.is_sqlite:
            _configure_sqlite(self.engine)

    async def close(self) -> None:
        """Close every connection."""
        await self.engine.dispose()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reading."""
        with _translated():
            async with self.engine.connect() as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """One transaction: all of it is durable when the block ends, or none is.

        Raises `Unavailable` when another process holds the lock for too long, `StorageFull` when the disk is full.
        """
        with _translated():
            async with self.engine.connect() as connection:
                if self.is_sqlite:
                    await connection.exec_driver_sql("BEGIN IMMEDIATE")
                async with connection.begin() if not connection.in_transaction() else _commit(connection):
                    yield connection


@asynccontextmanager
async def _commit(connection: AsyncConnection) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:
        await connection.rollback()
        raise
    await connection.commit()


class _translated:
    """Turn the driver's failures into errors that say what to do."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OperationalError):
            return
        text = str(error.orig).lower()
        if "full" in text:
            raise StorageFull("the disk that holds the database is full; free some space and try again") from error
        if "locked" in text or "busy" in text:
            raise Unavailable("the database is busy; try again", code="database_busy") from error
        raise Unavailable("the database cannot be reached; completions go on, changes must wait", code="database_lost") from error


def _configure_sqlite(engine: AsyncEngine) -> None:
    wal = sqlite3.sqlite_version_info >= _WAL_SAFE_SINCE

    @event.listens_for(engine.sync_engine, "connect")
    def _connect(connection: Any, record: object) -> None:
        connection.isolation_level = None  # we write BEGIN ourselves; the driver's own is deferred and can deadlock
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
        cursor.execute(f"PRAGMA journal_mode={'WAL' if wal else 'TRUNCATE'}")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()


async def record_audit(
    connection: AsyncConnection, *, project_id: str, actor: str, action: str, subject: str,
    before: Any = None, after: Any = None, reason: str | None = None,
) -> None:
    """Append to the audit log, in the caller's transaction."""
    await connection.execute(
        insert(tables.audit).values(
            id=new_id("audit-"), project_id=project_id, at=now(), actor=actor, action=action, subject=subject,
            before=before, after=after, reason=reason,
        )
    )


async def bump_revision(connection: AsyncConnection, name: str = "routing") -> int:
    """Advance the counter by which gateways see that their snapshot is old; in the caller's transaction."""
    table = tables.revisions
    moved = await connection.execute(update(table).where(table.c.name == name).values(value=table.c.value + 1).returning(table.c.value))
    value = moved.scalar_one_or_none()
    if value is None:
        await connection.execute(insert(table).values(name=name, value=1))
        return 1
    return int(value)


async def read_revision(connection: AsyncConnection, name: str = "routing") -> int:
    """The counter's value; 0 before the first change."""
    found = await connection.execute(select(tables.revisions.c.value).where(tables.revisions.c.name == name))
    return int(found.scalar_one_or_none() or 0)


def process_identity() -> str:
    """Who holds a lease: unique to this process and its start."""
    return f"{os.getpid()}-{time.monotonic_ns()}"
