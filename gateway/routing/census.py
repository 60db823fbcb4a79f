"""How many of what, for the metrics page: versions, residency, replicas, jobs and verdicts, counted in the database."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ColumnElement, case, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..database import Database

Counts = dict[tuple[str, ...], int]


@dataclass(frozen=True)
class Census:
    """Counts by label values."""

    versions: Counts
    residency: Counts
    replicas: Counts
    jobs: Counts
    verdicts: Counts


async def take_census(database: Database) -> Census:
    """Count everything now."""
    async with database.read() as connection:
        return Census(
            versions=await _count(connection, _standing()),
            residency=await _count(connection, tables.residency.c.state),
            replicas=await _count(connection, tables.replicas.c.state),
            jobs=await _count(connection, tables.jobs.c.kind, tables.jobs.c.state),
            verdicts=await _count(connection, tables.verdicts.c.suite, tables.verdicts.c.verdict),
        )


def _standing() -> ColumnElement[str]:
    table = tables.adapter_versions
    return case((table.c.retired_at.is_not(None), "retired"), else_=table.c.state)


async def _count(connection: AsyncConnection, *columns: ColumnElement[str]) -> Counts:
    rows = await connection.execute(select(*columns, func.count()).group_by(*columns))
    return {tuple(str(value) for value in row[:-1]): int(row[-1]) for row in rows}
