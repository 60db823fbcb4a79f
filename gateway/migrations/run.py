"""Bring the database to this program's schema: under a lock, after a backup, in one transaction, never backwards."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text
from sqlalchemy.ext.asyncio import AsyncConnection

from ..database import Database, sqlite_file
from ..durable import fsync
from ..errors import Invalid
from ..settings import Settings

_POSTGRES_LOCK = 0x7475726E6F7574  # "turnout"
log = structlog.get_logger(__name__)


async def migrate(settings: Settings) -> None:
    """Make or upgrade the schema. Safe to call from several processes at once, and when there is nothing to do.

    Raises `Invalid(code="schema_newer")` when a newer program has written the database.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database)
    try:
        async with _locked(settings.home / "migrate.lock"):
            await _migrate(database)
    finally:
        await database.close()


def head() -> str:
    """The revision that this program's tables are of."""
    return str(ScriptDirectory.from_config(_config()).get_current_head())


async def _migrate(database: Database) -> None:
    file = sqlite_file(database.url)
    if file is not None and not file.exists():
        _create_private(file)
    async with database.read() as connection:
        found = await connection.run_sync(_revision)
    _check(found, database.url)
    if found == head():
        return
    if file is not None and found is not None:
        await asyncio.to_thread(_back_up, file, file.with_name(f"{file.name}.{found}.bak"))
    async with database.write() as connection:
        await _lock_postgres(connection)
        await connection.run_sync(_upgrade)
    log.info("database migrated", before=found, after=head())


def _revision(connection: Connection) -> str | None:
    found = MigrationContext.configure(connection).get_current_revision()
    if found is None and inspect(connection).get_table_names():
        raise Invalid(
            "the database has tables and no schema version: it is another program's; set TURNOUT_DATABASE_URL to an empty one",
            code="schema_unknown",
        )
    return found


def _check(found: str | None, url: str) -> None:
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if found is not None and found not in known:
        raise Invalid(
            f"the database has schema {found}, which this version of Turnout does not know (its newest is {head()}): a newer version has "
            f"written it; run that version, or restore the backup it made (turnout.db.{head()}.bak)",
            code="schema_newer",
        )


def _upgrade(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


async def _lock_postgres(connection: AsyncConnection) -> None:
    """The file lock serves one machine; on PostgreSQL several may start at once."""
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _POSTGRES_LOCK})


def _back_up(source: Path, target: Path) -> None:
    """A whole copy through SQLite itself, so that a transaction in progress elsewhere cannot tear it."""
    temporary = target.with_name(target.name + ".part")
    temporary.unlink(missing_ok=True)
    _create_private(temporary)
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(temporary)) as new:
        old.backup(new)
    fsync(temporary)
    temporary.replace(target)
    log.info("database backed up", path=str(target))


def _create_private(file: Path) -> None:
    """It holds hashes of keys: for its owner alone."""
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))


@asynccontextmanager
async def _locked(path: Path) -> AsyncIterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        await asyncio.to_thread(fcntl.flock, descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
