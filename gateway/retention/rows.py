"""The SQL of retention: what is seen, how much is due, and one step of removing it. Every query ends at an index."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Integer, Select, Table, and_, delete, func, insert, literal_column, select, text, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..database import Database
from ..settings import RetentionSettings
from .due import SPLIT_ALLOWANCE, Overdue, Seen

COUNTED = 100_000  # no reader stays longer in a table than it takes to count so many
_JOBS_A_LOOK = 100
_COUNTER = "deleted."


async def look(database: Database, settings: RetentionSettings, now: datetime) -> Seen:
    """Everything that the decision needs, in short reads: on SQLite a long one holds up every writer."""
    allowed = settings.exposures_max_rows
    async with database.read() as connection:
        beyond = await _moment_beyond(connection, allowed)
        beyond_split = await _moment_beyond(connection, SPLIT_ALLOWANCE * allowed)
        exposed = await _distinct(connection, tables.exposures, "route") if beyond else []
        routes = (await connection.execute(select(tables.routes.c.name, tables.routes.c.variants))).all()
    return Seen(
        now=now,
        exposures_beyond=beyond,
        exposures_beyond_split=beyond_split,
        exposed_routes=tuple(exposed),
        split_routes=frozenset(row.name for row in routes if _is_split(row.variants)),
        crowded_jobs=await _crowded_jobs(database, settings.job_events_per_job),
    )


async def count(connection: AsyncConnection, due: Overdue) -> tuple[int, datetime | None]:
    """How many rows are due, `COUNTED` and one at most, and the moment of the oldest."""
    some = _selected(due, due.kind.moment).limit(COUNTED + 1).subquery()
    found = (await connection.execute(select(func.count(), func.min(some.c[0])))).one()
    return int(found[0]), found[1]


async def oldest(connection: AsyncConnection, due: Overdue) -> datetime | None:
    """The moment of the oldest row that is due."""
    found = await connection.execute(_selected(due, due.kind.moment).order_by(due.kind.moment).limit(1))
    moment: datetime | None = found.scalar_one_or_none()
    return moment


async def remove(connection: AsyncConnection, due: Overdue, *, rows: int) -> int:
    """Remove at most so many, and count them for the metrics in the same transaction."""
    keys = tuple(due.kind.table.primary_key.columns)
    victims = _selected(due, *keys).limit(rows)
    mine = keys[0] if len(keys) == 1 else tuple_(*keys)
    gone = await connection.execute(delete(due.kind.table).where(mine.in_(victims)))
    if gone.rowcount:
        await add_deleted(connection, due.kind.name, gone.rowcount)
    return gone.rowcount


async def add_deleted(connection: AsyncConnection, kind: str, count: int) -> None:
    """Advance the counter of what was ever removed of a kind."""
    table, name = tables.revisions, f"{_COUNTER}{kind}"
    moved = await connection.execute(update(table).where(table.c.name == name).values(value=table.c.value + count))
    if not moved.rowcount:
        await connection.execute(insert(table).values(name=name, value=count))


async def read_deleted(connection: AsyncConnection) -> dict[str, int]:
    """What was ever removed, by kind."""
    table = tables.revisions
    rows = await connection.execute(select(table).where(table.c.name.startswith(_COUNTER)))
    return {row.name.removeprefix(_COUNTER): int(row.value) for row in rows}


async def table_rows(connection: AsyncConnection) -> dict[str, int]:
    """About how many rows the tables that grow have, without counting them; never too few on SQLite."""
    watched = (tables.exposures, tables.job_events, tables.job_attempts, tables.audit)
    return {table.name: await _about(connection, table) for table in watched}


def _selected(due: Overdue, *columns: Any) -> Select[Any]:
    conditions = [due.kind.moment < due.before]
    if due.after is not None:
        conditions.append(due.kind.moment >= due.after)
    conditions += [due.kind.table.c[name] == value for name, value in due.only]
    if due.is_guarded and due.kind.guard is not None:
        conditions.append(due.kind.guard)
    return select(*columns).where(and_(*conditions))


def _is_split(variants: Any) -> bool:
    return sum(1 for variant in variants or () if variant.get("weight", 0) > 0) > 1


async def _about(connection: AsyncConnection, table: Table) -> int:
    if connection.dialect.name == "sqlite":
        first, last = await _row_numbers(connection, table)
        return last - first + 1 if last else 0
    query = text("SELECT reltuples FROM pg_class WHERE relname = :name")
    return max(0, int((await connection.execute(query, {"name": table.name})).scalar_one_or_none() or 0))


async def _row_numbers(connection: AsyncConnection, table: Table) -> tuple[int, int]:
    """First and last row number of SQLite; rows are appended, and the oldest go first."""
    number = literal_column("rowid", Integer)
    ends = [
        (await connection.execute(select(number).select_from(table).order_by(order).limit(1))).scalar_one_or_none()
        for order in (number, number.desc())
    ]
    return int(ends[0] or 0), int(ends[1] or 0)


async def _moment_beyond(connection: AsyncConnection, allowed: int) -> datetime | None:
    """The moment of the oldest exposure that is among the newest `allowed`; None where all are."""
    table = tables.exposures
    if connection.dialect.name != "sqlite":
        query = select(table.c.at).order_by(table.c.at.desc()).offset(allowed - 1).limit(2)
        found = list((await connection.execute(query)).scalars())
        return found[0] if len(found) > 1 else None
    first, last = await _row_numbers(connection, table)
    if last - first < allowed:
        return None
    number = literal_column("rowid", Integer)
    kept = select(table.c.at).where(number > last - allowed).order_by(number).limit(1)
    return (await connection.execute(kept)).scalar_one_or_none()


async def _distinct(
    connection: AsyncConnection, table: Table, column: str, *, after: str = "", most: int = 10_000
) -> list[str]:
    """The distinct values of an indexed column, in order; one seek for each."""
    found: list[str] = []
    while len(found) < most:
        following = await connection.execute(select(func.min(table.c[column])).where(table.c[column] > after))
        value = following.scalar_one_or_none()
        if value is None:
            break
        found.append(after := str(value))
    return found


async def _crowded_jobs(database: Database, allowed: int) -> tuple[tuple[str, datetime], ...]:
    crowded: list[tuple[str, datetime]] = []
    after = ""
    while True:
        async with database.read() as connection:
            jobs = await _distinct(connection, tables.job_events, "job_id", after=after, most=_JOBS_A_LOOK)
            moments = await _oldest_kept_of(connection, jobs, allowed)
        crowded += [(job_id, moment) for job_id, moment in zip(jobs, moments, strict=True) if moment is not None]
        if not jobs:
            return tuple(crowded)
        after = jobs[-1]


async def _oldest_kept_of(connection: AsyncConnection, jobs: Sequence[str], allowed: int) -> list[datetime | None]:
    return [await _oldest_kept(connection, job_id, allowed) for job_id in jobs]


async def _oldest_kept(connection: AsyncConnection, job_id: str, allowed: int) -> datetime | None:
    """The moment of the oldest of a job's newest `allowed` events; None where it has no more."""
    table = tables.job_events
    mine = table.c.job_id == job_id
    has = await connection.execute(
        select(func.count()).select_from(select(1).where(mine).limit(allowed + 1).subquery())
    )
    if int(has.scalar_one()) <= allowed:
        return None
    query = select(table.c.at).where(mine).order_by(table.c.at.desc(), table.c.id.desc()).offset(allowed - 1).limit(1)
    return (await connection.execute(query)).scalar_one_or_none()
