"""SQL of what the gateways are told of adapters on a replica, and of what decides who is needed."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..errors import Conflict
from ..ids import now
from ..registry.models import ReplicaState, ResidencyState, VersionState
from .ledger import names_in
from .models import Resident
from .plan import RouteTargets
from .probe import Fault


class StaleEpoch(Conflict):
    """The engine was started anew meanwhile: what was seen of the old one is worth nothing."""

    code = "stale_epoch"


async def read_rows(connection: AsyncConnection, replica_id: str) -> dict[str, Resident]:
    """What gateways believe of one replica, by the version's name in engines."""
    table = tables.residency
    found = await connection.execute(select(table).where(table.c.replica_id == replica_id))
    return {
        row["engine_name"]: Resident(
            engine_name=row["engine_name"], state=ResidencyState(row["state"]), code=row["code"], reason=row["reason"]
        )
        for row in found.mappings()
    }


async def check_epoch(connection: AsyncConnection, replica_id: str, epoch: str) -> None:
    """Raise `StaleEpoch` unless this start of the engine is still the present one."""
    found = await connection.execute(select(tables.replicas.c.epoch).where(tables.replicas.c.id == replica_id))
    if found.scalar_one_or_none() != epoch:
        raise StaleEpoch(f"{replica_id} was started anew; what was seen of its last start is dropped")


async def put_row(
    connection: AsyncConnection, replica_id: str, engine_name: str, state: ResidencyState, fault: Fault | None
) -> None:
    """Say how a version stands on a replica."""
    await drop_row(connection, replica_id, engine_name)
    await connection.execute(
        insert(tables.residency).values(
            replica_id=replica_id,
            engine_name=engine_name,
            state=state,
            code=fault.code if fault else None,
            reason=fault.reason if fault else None,
            updated_at=now(),
        )
    )


async def drop_row(connection: AsyncConnection, replica_id: str, engine_name: str) -> None:
    """Say nothing of it any more."""
    table = tables.residency
    mine = (table.c.replica_id == replica_id) & (table.c.engine_name == engine_name)
    await connection.execute(delete(table).where(mine))


async def check_servable(connection: AsyncConnection, version_id: str) -> None:
    """Raise `Conflict` when a version was retired or quarantined since it was read."""
    table = tables.adapter_versions
    query = select(table.c.state, table.c.retired_at).where(table.c.id == version_id)
    found = (await connection.execute(query)).one_or_none()
    if found is None or found.state != VersionState.VERIFIED or found.retired_at is not None:
        raise Conflict("the version is no longer to be loaded", code="not_servable")


async def names_held(connection: AsyncConnection, run_dir: Path) -> set[str]:
    """Names whose files an engine that runs may read again: unloaded ones stay in its memory."""
    table = tables.replicas
    running = await connection.execute(select(table.c.epoch).where(table.c.state != ReplicaState.STOPPED))
    return names_in(run_dir, set(running.scalars()))


async def read_targets(connection: AsyncConnection) -> list[RouteTargets]:
    """What every route may send traffic to."""
    rows = (await connection.execute(select(tables.routes).order_by(tables.routes.c.name))).mappings()
    return [
        RouteTargets(
            row["stable"],
            row["previous"],
            tuple(variant["target"] for variant in row["variants"] if variant["weight"] > 0),
            row["candidate"],
        )
        for row in rows
    ]


async def read_evaluated(connection: AsyncConnection) -> list[str]:
    """Versions that unfinished evaluations ask, oldest evaluation first."""
    jobs = tables.jobs
    unfinished = (jobs.c.kind == "evaluation") & jobs.c.state.not_in(tables.FINAL_JOB_STATES)
    specs = (await connection.execute(select(jobs.c.spec).where(unfinished).order_by(jobs.c.id))).scalars()
    return [name for spec in specs for name in (spec.get("target"), spec.get("stable")) if name]
