"""A journalled rollback, told to the database: one transaction, safe to repeat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..audit import latest_changes, record_audit
from ..database import Database
from ..errors import NotFound
from ..routing.models import Route, Variant
from ..routing.store import get_route, save_route
from .conditions import RouteVersion, versions_of
from .decided import Mover, last_move, pointers_of
from .journal import Outcome, Rollback
from .settlement import Settlement, settle

_AUDIT_LOOKBACK = 200


async def carry(database: Database, record: Rollback) -> Outcome:
    """Have the database follow the rollback, unless it does already; what became of it."""
    async with database.write(urgent=True) as connection:
        told = await _told_before(connection, record)
        if told is not None:
            return told
        try:
            held = await get_route(connection, record.route, project_id=record.project_id)
        except NotFound:
            await _audit(connection, record, None, None, "route_gone")
            return "route_gone"
        versions = await versions_of(connection, held)
        past = [version.past for version in versions]
        pointers = pointers_of(held, versions[0].base_model)
        settlement = settle(pointers, held.arms, past, record, is_unmoved=held.revision == record.decided_on)
        after = await _apply(connection, held, settlement, versions, record)
        outcome: Outcome = "applied" if settlement.moves_traffic else "superseded"
        await _audit(connection, record, held, after, outcome)
        return outcome


async def _told_before(connection: AsyncConnection, record: Rollback) -> Outcome | None:
    """What the audit log says of it: a gateway may have died after it told the database."""
    told = await latest_changes(
        connection, project_id=record.project_id, action="route.rollback", subject=record.route, limit=_AUDIT_LOOKBACK
    )
    for after in told:
        noted = (after or {}).get("break_glass")
        if isinstance(noted, dict) and noted.get("id") == record.id:
            outcome: Outcome = noted["outcome"]
            return outcome
    return None


async def _apply(
    connection: AsyncConnection,
    held: Route,
    settlement: Settlement,
    versions: Sequence[RouteVersion],
    record: Rollback,
) -> Route:
    pointers = settlement.pointers
    mover = Mover(record.actor, record.at)
    changes: dict[str, Any] = {
        "stable": pointers.stable,
        "previous": pointers.previous,
        "candidate": pointers.candidate,
    }
    if settlement.moves_traffic:
        moved_from = ", ".join(record.withdrawn) or held.stable
        changes["variants"] = (Variant(target=pointers.stable, weight=100),)
        changes["trial"] = None
        changes["last_move"] = last_move("rollback", held, mover, moved_from=moved_from, moved_to=pointers.stable)
    saved = await save_route(connection, held.model_copy(update=changes), actor=record.actor)
    table = tables.adapter_versions
    for version in versions:
        values: dict[str, Any] = {}
        if version.name in settlement.marks and not version.past.is_rolled_back:
            values["rolled_back_at"] = record.at
        if version.name == settlement.unmarks:
            values["rolled_back_at"] = None
        if values:
            await connection.execute(update(table).where(table.c.id == version.id).values(**values))
    return saved


async def _audit(
    connection: AsyncConnection, record: Rollback, before: Route | None, after: Route | None, outcome: Outcome
) -> None:
    note = {
        "id": record.id,
        "outcome": outcome,
        "journalled_at": record.at.isoformat(),
        "decided_on": record.decided_on,
        "served": record.after.model_dump(mode="json"),
    }
    await record_audit(
        connection,
        project_id=record.project_id,
        actor=record.actor,
        action="route.rollback",
        subject=record.route,
        before=before.audited() if before else None,
        after=(after.audited() if after else {}) | {"break_glass": note},
        reason=record.reason,
    )
