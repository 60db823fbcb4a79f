"""A rollback while the database is locked or gone: decided on the table in memory, journalled on disk, told to the database later.

Traffic follows at once, also that of a gateway that starts meanwhile. When the database is back it is told by one
compare-and-swap, with what it says then:

- It still, or again, sends traffic to what the rollback left: that is taken out of traffic, whoever moved the route since.
- It sends none there: somebody has moved on. That later move stands, and what was left is marked all the same.

Either way the audit log tells it, with the reason, and nobody has to do anything.
"""

from __future__ import annotations

import asyncio
import time

import structlog
from sqlalchemy import update

from .. import tables
from ..database import Database
from ..errors import GatewayError, Invalid, NotFound, StorageFull, Unavailable
from ..ids import new_id, now
from ..keys import Principal
from ..routing.models import Route, Variant
from ..routing.overlay import overlaid
from ..routing.snapshot import Snapshot, SnapshotRoute
from ..routing.store import route_moved
from ..routing.table import RoutingTable
from .calls import Call, stated
from .carry import carry
from .conditions import would_strand
from .decided import already_rolled_back
from .journal import Journal, Pointing, Rollback, Settled
from .models import Moved
from .pointers import Move, Past, Pointers, is_relative, resolved, roll_back
from .promotion import Promotions

log = structlog.get_logger(__name__)

# Somebody waits for this with an outage before their eyes.
PATIENCE_S = 2.0
_RECONCILE_EVERY_S = 0.5


class BreakGlass:
    """Rolls back with or without the database, and tells it later."""

    def __init__(self, database: Database, table: RoutingTable, promotions: Promotions, journal: Journal) -> None:
        self._database = database
        self._table = table
        self._promotions = promotions
        self._journal = journal
        self._lock = asyncio.Lock()
        table.lay_over(lambda snapshot: overlaid(snapshot, [record.override for record in journal.open]))

    @property
    def open(self) -> int:
        """Rollbacks that the database does not know yet."""
        return len(self._journal.open)

    async def rollback(
        self,
        route: str,
        *,
        to: str | None = None,
        force: bool = False,
        further: bool = False,
        accept_load: bool = False,
        cut: bool = False,
        reason: str | None = None,
        principal: Principal,
        expected_revision: int | None = None,
        idempotency_key: str | None = None,
        dry_run: bool = False,
    ) -> Moved:
        """An ordinary rollback when the database takes it, else a journalled one. Pressed again, it answers the same.

        Takes and raises what `Promotions.rollback` does, and raises `Unavailable` when not even the journal can be
        written. A journalled one knows its repeats by the route alone.
        """
        started = time.perf_counter()
        call = Call(
            action="route.rollback",
            route=route,
            principal=principal,
            force=force,
            reason=_stated(reason),
            expected_revision=expected_revision,
        )
        if await self._takes_writes():
            try:
                await self.reconcile()
                return await self._promotions.rollback(
                    route,
                    to=to,
                    force=force,
                    further=further,
                    accept_load=accept_load,
                    cut=cut,
                    reason=reason,
                    principal=principal,
                    expected_revision=expected_revision,
                    idempotency_key=idempotency_key,
                    dry_run=dry_run,
                )
            except (Unavailable, StorageFull) as error:
                log.warning("the database took no rollback; it is journalled", error=error.message)
        async with self._lock:
            first = None if further else self._repeated(call, to)
            record = first or self._decide(call, to, further=further, accept_load=accept_load)
            if first is None and not dry_run:
                await asyncio.to_thread(self._journal.append, record)
                self._table.lay_over_again()
                log.warning("traffic moved by a journalled rollback", **record.model_dump(mode="json"))
        moved = self._answer(record, (time.perf_counter() - started) * 1000)
        moved = moved.model_copy(update={"repeated": first is not None, "dry_run": dry_run})
        return moved if dry_run or not cut else self._promotions.cut_left(moved)

    async def _takes_writes(self) -> bool:
        try:
            async with self._database.write(urgent=True, wait_s=PATIENCE_S) as connection:
                # A real change, though of nothing: its commit needs what a rollback's would.
                table = tables.revisions
                await connection.execute(update(table).values(value=table.c.value))
        except (Unavailable, StorageFull) as error:
            log.warning("the database takes no write", error=error.message)
            return False
        return True

    def _repeated(self, call: Call, to: str | None) -> Rollback | None:
        """The open rollback that this one asks for again: whoever presses twice goes back once."""
        project_id = call.principal.project_id
        mine = [each for each in self._journal.open if each.route == call.route and each.project_id == project_id]
        if not mine or to not in (None, mine[-1].to, mine[-1].after.stable):
            return None
        return mine[-1] if call.expected_revision in (None, mine[-1].decided_on) else None

    def _decide(self, call: Call, to: str | None, *, further: bool, accept_load: bool) -> Rollback:
        snapshot, name = self._table.current, call.route
        route = snapshot.routes.get(name)
        if route is None or route.project_id != call.principal.project_id:
            raise NotFound(f"no route {name!r:.100}; `GET /api/routes` lists them", code="route_not_found")
        if call.expected_revision not in (None, route.revision):
            raise route_moved(name, expected=call.expected_revision or 0, found=route.revision)
        move = _move(snapshot, route, to=to, force=call.force)
        after = move.pointers
        if route.last_action == "rollback" and not further and is_relative(to, name):
            raise already_rolled_back(name, leads_to=after.stable)
        if snapshot.serving(None) and _needs_load(snapshot, after.stable) and not accept_load:
            raise would_strand(name, after.stable, base=after.base)
        return Rollback(
            id=new_id("rollback-"),
            at=now(),
            actor=call.principal.actor,
            reason=call.reason or "",
            route=name,
            project_id=route.project_id,
            decided_on=route.revision,
            to=to,
            before=Pointing(
                stable=route.stable,
                previous=route.previous,
                candidate=route.candidate,
                variants=route.variants,
                trial=route.trial,
            ),
            after=Pointing(
                stable=after.stable,
                previous=after.previous,
                candidate=after.candidate,
                variants=((after.stable, 100),),
            ),
            # The base model is no version: whoever sends traffic to it later means it.
            left=tuple(name for name in dict.fromkeys((*move.marks, *move.withdrawn)) if name != after.base),
            marks=move.marks,
            unmarks=move.unmarks,
            withdrawn=move.withdrawn,
        )

    def _answer(self, record: Rollback, took_ms: float) -> Moved:
        found = self._table.current.routes[record.route]
        before = _route(found, record, record.before, revision=record.decided_on)
        route = _route(found, record, record.after, revision=record.decided_on + 1)
        return Moved(
            before=before,
            route=route,
            moved_from=", ".join(record.withdrawn) or record.before.stable,
            moved_to=record.after.stable,
            revision=route.revision,
            took_ms=took_ms,
            needs_load=_needs_load(self._table.current, record.after.stable),
            marked=record.marks,
            journalled=True,
        )

    # ---- When the database is back

    async def run(self) -> None:
        """Tell the database what is journalled as soon as it can be told, until cancelled."""
        was_failing = False
        while True:
            await asyncio.sleep(_RECONCILE_EVERY_S)
            try:
                await self.reconcile()
                was_failing = False
            except Exception as error:
                if not was_failing:
                    known = isinstance(error, GatewayError)
                    log.error("journalled rollbacks wait", error=str(error), open=self.open, exc_info=not known)
                was_failing = True

    async def reconcile(self) -> None:
        """Carry every open rollback into the database, in order. Safe to repeat, and to be killed in."""
        if not self.open:
            return
        async with self._lock:
            for record in self._journal.open:
                outcome = await carry(self._database, record)
                line = Settled(id=record.id, at=now(), outcome=outcome)
                await asyncio.to_thread(self._journal.append, line)
                log.warning("a journalled rollback is in the database", id=record.id, outcome=outcome)
            await self._table.refresh(anew=True)


def _stated(reason: str | None) -> str:
    found = stated(reason)
    if found is None:
        raise Invalid(
            "`break_glass` needs a `reason`; it goes into the journal and the audit log",
            code="reason_required",
            param="reason",
        )
    return found


def _route(found: SnapshotRoute, record: Rollback, pointing: Pointing, *, revision: int) -> Route:
    return Route(
        name=record.route,
        revision=revision,
        salt=found.salt,
        stable=pointing.stable,
        previous=pointing.previous,
        candidate=pointing.candidate,
        variants=tuple(Variant(target=target, weight=weight) for target, weight in pointing.variants),
        trial=pointing.trial,
        gates=found.gates,
        project_id=record.project_id,
        updated_at=record.at,
        updated_by=record.actor,
    )


def _move(snapshot: Snapshot, route: SnapshotRoute, *, to: str | None, force: bool) -> Move:
    """The same decision as the database's, on what is in memory."""
    mine = [
        version
        for version in snapshot.versions.values()
        if version.adapter == route.name and version.project_id == route.project_id
    ]
    if not mine:
        raise Invalid(f"route {route.name!r} has no version", code="not_a_version")
    past = [
        Past(
            name=version.name,
            version=version.version,
            was_stable=version.is_promoted,
            is_rolled_back=version.is_rolled_back,
            is_servable=version.state == "verified" and not version.is_retired,
        )
        for version in mine
    ]
    pointers = Pointers(
        base=mine[0].base_model or next(iter(snapshot.bases)),
        stable=route.stable,
        previous=route.previous,
        candidate=route.candidate,
        tried=route.tried,
    )
    return roll_back(pointers, past, to=resolved(to, route.name, pointers, past), force=force)


def _needs_load(snapshot: Snapshot, target: str) -> bool:
    version = snapshot.versions.get(target)
    return version is not None and len(snapshot.serving(version.engine_name)) < max(1, len(snapshot.serving(None)))
