"""What tests of the registry share: a home with its database, and short ways to publish and to look."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy import select

from gateway.database import DEFAULT_PROJECT, Database
from gateway.migrations.run import migrate
from gateway.registry.models import AdapterVersion
from gateway.registry.service import Registry
from gateway.settings import Settings
from gateway.tables import audit


def a_home(path: Path) -> Settings:
    """Settings of a home whose directories exist."""
    settings = Settings(home=path)
    settings.prepare_directories()
    return settings


@asynccontextmanager
async def a_database(settings: Settings) -> AsyncIterator[Database]:
    """The home's database, at the newest schema."""
    await migrate(settings)
    database = Database(settings.database)
    yield database
    await database.close()


async def publish(
    registry: Registry, source: Path, adapter: str = "support", **options: str
) -> tuple[AdapterVersion, bool]:
    return await registry.publish(adapter, source, actor="key:test", project_id=DEFAULT_PROJECT, **options)


async def rows_of_audit(database: Database) -> list[tuple[str, str]]:
    async with database.read() as connection:
        found = await connection.execute(select(audit.c.action, audit.c.subject).order_by(audit.c.id))
        return [(row.action, row.subject) for row in found]


def staged(settings: Settings) -> list[Path]:
    return list((settings.artifacts_dir / ".staging").glob("*"))
