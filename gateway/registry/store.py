"""SQL of adapters and their versions. Every function runs in the caller's transaction."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from ..fitting import fit
from ..tables import adapter_versions, adapters, routes
from .models import Adapter, AdapterVersion, VersionState


async def read_versions(
    connection: AsyncConnection, *, adapter: str | None = None, states: Collection[VersionState] | None = None
) -> list[AdapterVersion]:
    """Versions by adapter, oldest first."""
    query = select(adapter_versions).order_by(adapter_versions.c.adapter, adapter_versions.c.version)
    if adapter is not None:
        query = query.where(adapter_versions.c.adapter == adapter)
    if states is not None:
        query = query.where(adapter_versions.c.state.in_([state.value for state in states]))
    return [_version(row) for row in await connection.execute(query)]


async def read_version(connection: AsyncConnection, adapter: str, number: int) -> AdapterVersion | None:
    """One version by its number."""
    query = select(adapter_versions).where(adapter_versions.c.adapter == adapter, adapter_versions.c.version == number)
    return _maybe_version((await connection.execute(query)).one_or_none())


async def read_version_by_id(connection: AsyncConnection, version_id: str) -> AdapterVersion | None:
    """One version by its id."""
    query = select(adapter_versions).where(adapter_versions.c.id == version_id)
    return _maybe_version((await connection.execute(query)).one_or_none())


async def read_version_by_digest(connection: AsyncConnection, adapter: str, digest: str) -> AdapterVersion | None:
    """The version of an adapter that has these bytes."""
    query = select(adapter_versions).where(adapter_versions.c.adapter == adapter, adapter_versions.c.digest == digest)
    return _maybe_version((await connection.execute(query)).one_or_none())


async def read_adapters(connection: AsyncConnection) -> list[Adapter]:
    """Every adapter with its versions, by name."""
    versions: dict[str, list[AdapterVersion]] = {}
    for version in await read_versions(connection):
        versions.setdefault(version.adapter, []).append(version)
    rows = await connection.execute(select(adapters).order_by(adapters.c.name))
    return [_adapter(row, versions.get(row.name, [])) for row in rows]


async def read_adapter(connection: AsyncConnection, name: str) -> Adapter | None:
    """One adapter with its versions."""
    row = (await connection.execute(select(adapters).where(adapters.c.name == name))).one_or_none()
    return None if row is None else _adapter(row, await read_versions(connection, adapter=name))


async def read_owner(connection: AsyncConnection, name: str) -> str | None:
    """The project that an adapter, or a route of that name, belongs to."""
    for table in (adapters, routes):
        found = await connection.execute(select(table.c.project_id).where(table.c.name == name))
        if (owner := found.scalar_one_or_none()) is not None:
            return str(owner)
    return None


async def insert_adapter(connection: AsyncConnection, values: dict[str, Any]) -> None:
    """Add an adapter. Raises `IntegrityError` when the name is taken."""
    await connection.execute(insert(adapters).values(**values))


async def insert_version(connection: AsyncConnection, version: AdapterVersion) -> None:
    """Add a version. Raises `IntegrityError` when its number or digest is taken."""
    await connection.execute(insert(adapter_versions).values(**version.model_dump()))


async def next_number(connection: AsyncConnection, adapter: str) -> int:
    """The number that the adapter's next version gets; they start at 1."""
    found = await connection.execute(
        select(func.max(adapter_versions.c.version)).where(adapter_versions.c.adapter == adapter)
    )
    return int(found.scalar_one_or_none() or 0) + 1


async def update_state(
    connection: AsyncConnection, version: AdapterVersion, *, state: VersionState, code: str | None, reason: str | None
) -> bool:
    """Move a version on from the state it was read in; False when it has moved since."""
    moved = await connection.execute(
        update(adapter_versions)
        .where(adapter_versions.c.id == version.id, adapter_versions.c.state == version.state.value)
        .values(state=state.value, **fit(adapter_versions, {"state_code": code, "state_reason": reason}))
    )
    return moved.rowcount == 1


async def update_retired(connection: AsyncConnection, version: AdapterVersion, *, retired_at: datetime | None) -> None:
    """Take a version out of what engines load, or back into it."""
    mine = adapter_versions.c.id == version.id
    await connection.execute(update(adapter_versions).where(mine).values(retired_at=retired_at))


def _maybe_version(row: Row[Any] | None) -> AdapterVersion | None:
    return None if row is None else _version(row)


def _version(row: Row[Any]) -> AdapterVersion:
    return AdapterVersion.model_validate(row._asdict())


def _adapter(row: Row[Any], versions: list[AdapterVersion]) -> Adapter:
    return Adapter(name=row.name, created_at=row.created_at, created_by=row.created_by, versions=tuple(versions))
