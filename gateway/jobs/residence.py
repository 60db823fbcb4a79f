"""Can a version be served now? Verified, loaded and probed on every engine that takes traffic."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from pydantic import BaseModel
from sqlalchemy import func, select

from .. import tables
from ..database import Database
from ..registry.models import AdapterVersion, ReplicaState, ResidencyState, VersionState


class Residence(BaseModel, frozen=True):
    """The answer, with the cause when it will not come true by waiting."""

    state: Literal["ready", "waiting", "impossible"]
    code: str | None = None
    reason: str | None = None


class Place(BaseModel, frozen=True):
    """How the version stands on one ready replica; `state` None: not there yet."""

    state: ResidencyState | None = None
    code: str | None = None
    reason: str | None = None


WAITING = Residence(state="waiting")
READY = Residence(state="ready")


def judge_residence(
    version: AdapterVersion, places: Mapping[str, Place], *, engine_enabled: bool, given_up: str | None = None
) -> Residence:
    """Decide from the version's state and its places on the ready replicas. Without an engine verified is enough."""
    if version.retired_at is not None:
        return Residence(state="impossible", code="version_retired", reason=f"{version.name} is retired")
    if version.state in (VersionState.REJECTED, VersionState.QUARANTINED):
        return Residence(state="impossible", code=version.state_code or str(version.state), reason=version.state_reason)
    if version.state is VersionState.RECEIVED:
        if version.state_code is not None:  # its files are damaged: it waits for them, and nobody should wait for it
            return Residence(state="impossible", code=version.state_code, reason=version.state_reason)
        if given_up:
            return Residence(state="impossible", code="verify_crashed", reason=f"its verification died: {given_up}")
        return WAITING
    if not engine_enabled:
        return READY
    for place in places.values():
        if place.state is ResidencyState.QUARANTINED:
            return Residence(state="impossible", code=place.code or "quarantined", reason=place.reason)
        if place.state is ResidencyState.REFUSED:
            reason = (
                place.reason or "the engine has no room for it; raise engine.max_cpu_loras and start the server again"
            )
            return Residence(state="impossible", code=place.code or "no_room", reason=reason)
    if places and all(place.state is ResidencyState.READY for place in places.values()):
        return READY
    return WAITING


async def residence_of(
    database: Database, version: AdapterVersion, *, engine_enabled: bool, given_up: str | None = None
) -> Residence:
    """Look at the replicas that take traffic, and judge."""
    replicas, residency = tables.replicas, tables.residency
    joined = replicas.outerjoin(
        residency, (residency.c.replica_id == replicas.c.id) & (residency.c.engine_name == version.engine_name)
    )
    query = (
        select(replicas.c.id, residency.c.state, residency.c.code, residency.c.reason)
        .select_from(joined)
        .where(replicas.c.state == ReplicaState.READY)
    )
    async with database.read() as connection:
        rows = (await connection.execute(query)).all()
    places = {row.id: Place(state=row.state, code=row.code, reason=row.reason) for row in rows}
    return judge_residence(version, places, engine_enabled=engine_enabled, given_up=given_up)


async def batch_noise(database: Database) -> float | None:
    """Nats by which batches alone move answers of the engines that take traffic, the largest; None when none was measured."""
    table = tables.replicas
    query = select(func.max(table.c.batch_noise)).where(table.c.state == ReplicaState.READY)
    async with database.read() as connection:
        found: float | None = (await connection.execute(query)).scalar_one()
    return found


class ResidencyRow(BaseModel, frozen=True):
    """One version on one replica, as it is shown."""

    replica_id: str
    state: ResidencyState
    code: str | None
    reason: str | None
    updated_at: datetime


async def residency_rows(database: Database, engine_name: str) -> tuple[ResidencyRow, ...]:
    """Where a version is loaded, or why it is not."""
    table = tables.residency
    query = select(table).where(table.c.engine_name == engine_name).order_by(table.c.replica_id)
    async with database.read() as connection:
        rows = (await connection.execute(query)).mappings().all()
    return tuple(ResidencyRow.model_validate({name: row[name] for name in ResidencyRow.model_fields}) for row in rows)
