"""The one SQL database: connections, transactions, and the counters by which others see that something changed."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import aiosqlite
from sqlalchemy import Connection, event, insert, make_url, select, update
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from . import tables
from .errors import StorageFull, Unavailable
from .turns import Hurry, Turns

DEFAULT_PROJECT = "proj_default"
# Two processes writing one WAL file can corrupt it on SQLite older than this (sqlite.org/wal.html#walresetbug).
WAL_SAFE_SINCE = (3, 51, 3)
_BUSY_TIMEOUT_MS = 5_000
# What a move of traffic waits for the lock: longer than anybody else, who gives up before it does.
_URGENT_TIMEOUT_MS = 15_000
_LEAST_COMMIT_MS = 500
_DAMAGED = ("malformed", "not a database")
_URGENT_LOOK_S = 0.005
_STAND_BACK_LOOK_S = 0.01
# Raises when this process may no longer act, as seen by the transaction it is given.
Fence = Callable[[AsyncConnection], Awaitable[None]]


class Database:
    """Connections to the state. `read` sees one committed state; `write` is one transaction, serialised on SQLite.

    Keep both blocks short and never open a `write` inside a `read` of the same task: on SQLite an open reader holds up
    every writer's commit.
    """

    def __init__(self, url: str, *, must_exist: bool = False) -> None:
        self.url = url
        self._must_exist = must_exist
        self.is_sqlite = url.startswith("sqlite")
        connected = {"connect_args": {"async_creator_fn": _connect_sqlite}} if self.is_sqlite else {}
        self.engine: AsyncEngine = create_async_engine(url, pool_pre_ping=not self.is_sqlite, **connected)
        self._writer = self.engine.execution_options(turnout_write=True)
        if not self.is_sqlite:
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ")
        else:
            self._reader = self.engine
            _configure_sqlite(self.engine)
        self._file = sqlite_file(url)
        self._inode: int | None = None
        self._mover = self._writer
        self._hurry: Hurry | None = None
        if self._file is not None:
            # Connections of their own: where the lock is held, others wait on all of the pool's.
            movers = create_async_engine(url, **connected)
            _configure_sqlite(movers)
            self._mover = movers.execution_options(turnout_write=True, turnout_urgent=True)
            self._hurry = Hurry(self._file)
        # SQLite's own queue of writers is a lottery (they sleep and try again); this one is fair within the process.
        self._turn = Turns()
        self._held_by: dict[asyncio.Task[Any] | None, str] = {}
        self._fence: Fence | None = None

    async def close(self) -> None:
        """Close every connection."""
        await self.engine.dispose()
        if self._mover is not self._writer:
            await self._mover.dispose()
        if self._hurry is not None:
            self._hurry.close()

    def fence_with(self, fence: Fence) -> None:
        """From now on every `write` asks `fence` first, in its own transaction."""
        self._fence = fence

    async def check_fence(self) -> None:
        """Raise what the fence raises. For what is done to processes, right before it is done."""
        if self._fence is not None:
            async with self.read() as connection:
                await self._fence(connection)

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A connection for reading: all queries in the block see one state."""
        with _translated(), self._entered("read"):
            self._same_file()
            async with self._reader.begin() as connection:
                self._same_file()
                yield connection

    @asynccontextmanager
    async def write(
        self, *, is_fenced: bool = True, urgent: bool = False, wait_s: float | None = None
    ) -> AsyncIterator[AsyncConnection]:
        """One transaction: all of it is durable when the block ends, or none is.

        `urgent` is for what moves traffic: it goes before all other writes, of this process and of those beside it, and
        waits longer, unless `wait_s` says how long. Raises `Unavailable` when another process holds the lock for too
        long, `StorageFull` when the disk is full.
        """
        task = asyncio.current_task()
        if task in self._held_by:
            raise RuntimeError(f"write() inside {self._held_by[task]}() of the same task would wait for itself")
        wait_s = wait_s or (_URGENT_TIMEOUT_MS if urgent else 2 * _BUSY_TIMEOUT_MS) / 1000
        until = time.monotonic() + wait_s
        async with self._my_turn(wait_s, urgent=urgent):
            with _translated(), self._entered("write"):
                self._same_file()
                async with self._begun_before(until) if urgent else self._writer.begin() as connection:
                    self._same_file()
                    if is_fenced and self._fence is not None:
                        await self._fence(connection)
                    yield connection

    @asynccontextmanager
    async def _begun_before(self, until: float) -> AsyncIterator[AsyncConnection]:
        """A transaction of the urgent. They ask more often than SQLite's own waiting does, whose last steps are 100 ms."""
        async with self._mover.connect() as connection:
            while True:
                try:
                    await connection.begin()
                    break
                except OperationalError as error:
                    if not _is_busy(error) or time.monotonic() >= until:
                        raise
                await asyncio.sleep(_URGENT_LOOK_S)
            if self.is_sqlite:  # for the commit, which waits for readers
                left_ms = max(_LEAST_COMMIT_MS, int((until - time.monotonic()) * 1000))
                await connection.exec_driver_sql(f"PRAGMA busy_timeout={left_ms}")
            yield connection
            await connection.commit()

    @contextmanager
    def _entered(self, what: str) -> Iterator[None]:
        task = asyncio.current_task()
        if task in self._held_by:  # the outer block keeps the books
            yield
            return
        self._held_by[task] = what
        try:
            yield
        finally:
            del self._held_by[task]

    @asynccontextmanager
    async def _my_turn(self, wait_s: float, *, urgent: bool) -> AsyncIterator[None]:
        if not self.is_sqlite:
            yield
            return
        with self._hurry.shown() if urgent and self._hurry is not None else nullcontext():
            try:
                async with asyncio.timeout(wait_s):
                    await self._take_turn(urgent=urgent)
            except TimeoutError as error:
                raise Unavailable("the database is busy; try again", code="database_busy") from error
            try:
                yield
            finally:
                self._turn.release()

    async def _take_turn(self, *, urgent: bool) -> None:
        while True:
            await self._turn.acquire(urgent=urgent)
            if urgent or self._hurry is None or not self._hurry.is_shown_by_another():
                return
            self._turn.release()
            await asyncio.sleep(_STAND_BACK_LOOK_S)

    def _same_file(self) -> None:
        """Neither a new file in the old one's place nor the old one under another name is the state. Asked before connecting,
        which would create a missing file, and after, when the first connection has created it.
        """
        if self._file is None:
            return
        found = self._file.stat().st_ino if self._file.exists() else None
        if found is None and self._must_exist:
            raise Unavailable(f"the database {self._file.name} is missing; put it back", code="database_lost")
        self._inode = self._inode or found
        if found != self._inode:
            raise Unavailable(
                f"the database {self._file.name} was moved or replaced; put it back, or restart to use what is there now",
                code="database_lost",
            )


def sqlite_file(url: str) -> Path | None:
    """The file behind a SQLite URL; None for memory and for other databases."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database))


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the driver's failures into errors that say what to do."""
    try:
        yield
    except PoolTimeout as error:
        raise Unavailable("every database connection is in use; try again", code="database_busy") from error
    except DatabaseError as error:
        text = str(error.orig).lower()
        if not isinstance(error, OperationalError) and not any(sign in text for sign in _DAMAGED):
            raise
        if _is_busy(error):
            raise Unavailable("the database is busy; try again", code="database_busy") from error
        if "no such" in text or "syntax" in text:
            raise  # a mistake of ours, or a database without its schema; waiting does not help
        if "full" in text:
            raise StorageFull("the disk that holds the database is full; free some space and try again") from error
        raise Unavailable(
            "the database cannot be reached; completions go on, changes must wait", code="database_lost"
        ) from error


def _is_busy(error: DatabaseError) -> bool:
    text = str(error.orig).lower()
    return "locked" in text or "busy" in text


class _SqliteConnection(aiosqlite.Connection):
    """One that no cancellation cuts off in the middle of a statement: its open cursor would outlive the closed connection,
    and keep the file locked for every process until the garbage collector comes by."""

    async def _execute(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        running = asyncio.ensure_future(super()._execute(fn, *args, **kwargs))  # type: ignore[no-untyped-call]
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await _ended(running)
            cursor = getattr(fn, "__self__", None)
            if isinstance(cursor, sqlite3.Cursor):
                await _ended(asyncio.ensure_future(super()._execute(cursor.close)))  # type: ignore[no-untyped-call]
            raise


async def _ended(running: asyncio.Future[Any]) -> None:
    """Wait for its end, however often that is cancelled too."""
    while not running.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({running})
    running.exception()  # seen


def _connect_sqlite(file: str, **options: Any) -> _SqliteConnection:
    connection = _SqliteConnection(lambda: sqlite3.connect(file, **options), iter_chunk_size=64)
    connection._thread.daemon = True  # as SQLAlchemy's own would be
    return connection


def _configure_sqlite(engine: AsyncEngine) -> None:
    wal = sqlite3.sqlite_version_info >= WAL_SAFE_SINCE

    @event.listens_for(engine.sync_engine, "connect")
    def _connect(connection: Any, record: object) -> None:
        connection.isolation_level = None  # we write BEGIN ourselves; the driver's own is deferred and can deadlock
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
        cursor.execute(f"PRAGMA journal_mode={'WAL' if wal else 'TRUNCATE'}")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Connection) -> None:
        # Taking the write lock at once: a transaction that reads first and upgrades later can fail with a stale view.
        write = connection.get_execution_options().get("turnout_write", False)
        if connection.get_execution_options().get("turnout_urgent", False):
            connection.exec_driver_sql("PRAGMA busy_timeout=0")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


async def bump_revision(connection: AsyncConnection, name: str = "routing") -> int:
    """Advance the counter by which gateways see that their snapshot is old; in the caller's transaction."""
    table = tables.revisions
    moved = await connection.execute(
        update(table).where(table.c.name == name).values(value=table.c.value + 1).returning(table.c.value)
    )
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
