"""Move traffic: promote, roll back, split. Each is one transaction with one compare-and-swap and one audit row."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

import structlog
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..audit import record_audit
from ..database import Database
from ..errors import Invalid
from ..ids import now
from ..jobs.suites import Suites
from ..keys import Principal
from ..routing.models import Route, Variant, check_variants
from ..routing.store import get_route, route_moved, save_route
from .calls import Call, first_answer, keep_answer, stated
from .conditions import (
    RouteVersion,
    check_may_serve,
    check_not_rolled_back,
    check_resident,
    check_strands_nobody,
    check_verified,
    digest_of,
    named,
    needs_load,
    rising,
    versions_of,
)
from .decided import Decided, Mover, check_goes_no_further, pointers_of, promoted, rolled_back, split
from .gating import check_gates, suite_digests
from .models import Moved, RouteMoved
from .pointers import is_relative, promote, resolved, roll_back

log = structlog.get_logger(__name__)

MAX_VARIANTS = 16
MAX_GATES = 32
Decide = Callable[[AsyncConnection, Route, list[RouteVersion]], Awaitable[Decided]]


class Promotions:
    """The only code that changes where a route's traffic goes.

    Every move takes the `expected_revision` of the route that its caller saw and an `idempotency_key`: a call that is
    repeated with either gets the first answer for a day and moves nothing. With `dry_run` nothing moves at all.
    """

    def __init__(
        self,
        database: Database,
        *,
        suites: Suites | None = None,
        on_moved: Callable[[], Awaitable[None]] | None = None,
        on_cut: Callable[[Collection[str]], int] | None = None,
    ) -> None:
        self._database = database
        self._suites = suites
        self._on_moved = on_moved
        self._on_cut = on_cut

    async def promote(
        self,
        route: str,
        target: str | None,
        *,
        force: bool = False,
        reason: str | None = None,
        principal: Principal,
        expected_revision: int | None = None,
        idempotency_key: str | None = None,
        dry_run: bool = False,
    ) -> Moved:
        """All traffic to `target`, or to the candidate; a trial ends.

        Needs a passed gate of every suite for its very digest, or `force` and a reason; and always that it was verified
        and that every ready engine has it loaded.
        """
        call = Call(
            action="route.promote",
            route=route,
            principal=principal,
            asked={"target": target},
            force=force,
            reason=stated(reason),
            expected_revision=expected_revision,
            idempotency_key=idempotency_key,
            dry_run=dry_run,
        )
        gates = {} if force else await self._gates(route, principal)

        async def decide(connection: AsyncConnection, held: Route, versions: list[RouteVersion]) -> Decided:
            past = [version.past for version in versions]
            move = promote(pointers_of(held, versions[0].base_model), target, past, force=force)
            chosen = named(versions, move.pointers.stable)
            check_verified(chosen)
            await check_resident(connection, chosen)
            if not force:
                await check_gates(connection, held, chosen, gates, baseline=digest_of(versions, held.stable))
            return promoted(held, move, Mover(principal.actor, now()), is_gated=not force)

        return await self._move(call, decide)

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
        """End the trial, so that stable takes all traffic; without one, all traffic back to `previous`; or to `to`.

        Waits for no gate and no load. Onto a version that is not loaded it goes only with `accept_load`, and right after
        another rollback only with `further` or a named version. It acts on the route as it was when it was called
        (`expected_revision`, else what a first read finds): of two calls at once one moves and the other gets its answer.
        With `cut`, answers of what was left that still run on this gateway end with an error.
        """
        if expected_revision is None:
            async with self._database.read() as connection:
                expected_revision = (await get_route(connection, route, project_id=principal.project_id)).revision
        call = Call(
            action="route.rollback",
            route=route,
            principal=principal,
            asked={"to": to},
            force=force,
            reason=stated(reason),
            expected_revision=expected_revision,
            idempotency_key=idempotency_key,
            dry_run=dry_run,
        )

        async def decide(connection: AsyncConnection, held: Route, versions: list[RouteVersion]) -> Decided:
            past = [version.past for version in versions]
            pointers = pointers_of(held, versions[0].base_model)
            move = roll_back(pointers, past, to=resolved(to, route, pointers, past), force=force)
            target = move.pointers.stable
            if is_relative(to, route) and not further:
                check_goes_no_further(held, leads_to=target)
            is_missing = await needs_load(connection, versions, target)
            if is_missing and not accept_load:
                await check_strands_nobody(connection, held, versions, target)
            return rolled_back(held, move, Mover(principal.actor, now()), needs_load=is_missing)

        moved = await self._move(call, decide)
        return self.cut_left(moved) if cut and not dry_run else moved

    def cut_left(self, moved: Moved) -> Moved:
        """End the answers that still run here on what a move has left."""
        if self._on_cut is None:
            return moved
        left = set(moved.before.arms) - set(moved.route.arms)
        return moved.model_copy(update={"answers_cut": self._on_cut(left)})

    async def set_variants(
        self,
        route: str,
        variants: Sequence[Variant],
        *,
        tries: Sequence[str] | None = None,
        force: bool = False,
        reason: str | None = None,
        principal: Principal,
        expected_revision: int | None = None,
        idempotency_key: str | None = None,
        dry_run: bool = False,
    ) -> RouteMoved:
        """Split the traffic. `tries` names the arms that a rollback would take back; left out: every arm but stable.

        An arm must be verified. One whose share rises must be loaded on every ready engine and, unless it is stable now,
        not have been rolled back and have passed the route's gates, now or when it became stable; or `force` and a reason.
        """
        wanted = tuple(variants)
        call = Call(
            action="route.set_variants",
            route=route,
            principal=principal,
            asked={"variants": [variant.model_dump() for variant in wanted], "tries": tries and list(tries)},
            force=force,
            reason=stated(reason),
            expected_revision=expected_revision,
            idempotency_key=idempotency_key,
            dry_run=dry_run,
        )
        check_variants(wanted)
        if len(wanted) > MAX_VARIANTS:
            raise Invalid(f"{len(wanted)} variants; at most {MAX_VARIANTS}", code="too_many_variants", param="variants")
        gates = {} if force else await self._gates(route, principal, wanted)

        async def decide(connection: AsyncConnection, held: Route, versions: list[RouteVersion]) -> Decided:
            for variant in wanted:
                check_may_serve(held, versions, variant)
            for version in rising(held, versions, wanted):
                await check_resident(connection, version)
                if force or version.name == held.stable:  # more for what is stable is a step back
                    continue
                check_not_rolled_back(version)
                if not version.past.was_gated:
                    await check_gates(connection, held, version, gates, baseline=digest_of(versions, held.stable))
            return split(held, wanted, tries, Mover(principal.actor, now()))

        return RouteMoved.of(await self._move(call, decide))

    async def set_candidate(
        self,
        route: str,
        target: str | None,
        *,
        expected_revision: int | None = None,
        reason: str | None = None,
        principal: Principal,
    ) -> Route:
        """Name the version that comes next: engines load it, traffic stays where it is."""
        call = _settled(route, "route.set_candidate", principal, reason, expected_revision)
        async with self._database.write(urgent=True) as connection:
            held = await _held(connection, route, principal, expected_revision)
            if target is not None:
                check_verified(named(await versions_of(connection, held), target))
            after = await save_route(connection, held.model_copy(update={"candidate": target}), actor=principal.actor)
            await _audit(connection, held, after, call)
        await self._refresh()
        return after

    async def set_gates(
        self,
        route: str,
        suites: Sequence[str],
        *,
        expected_revision: int | None = None,
        reason: str | None = None,
        principal: Principal,
    ) -> Route:
        """Name the suites that a version must pass to be promoted here."""
        call = _settled(route, "route.set_gates", principal, reason, expected_revision)
        gates = tuple(dict.fromkeys(suites))
        if len(gates) > MAX_GATES:
            raise Invalid(f"{len(gates)} gates; at most {MAX_GATES}", code="too_many_gates", param="suites")
        await suite_digests(self._suites, gates)  # each must exist
        async with self._database.write(urgent=True) as connection:
            held = await _held(connection, route, principal, expected_revision)
            after = await save_route(connection, held.model_copy(update={"gates": gates}), actor=principal.actor)
            await _audit(connection, held, after, call)
        await self._refresh()
        return after

    async def _gates(
        self, route: str, principal: Principal, wanted: Sequence[Variant] | None = None
    ) -> Mapping[str, str | None]:
        """The route's suites with their present digests; none for a split by which nothing new gets a share."""
        async with self._database.read() as connection:
            found = await get_route(connection, route, project_id=principal.project_id)
            versions = await versions_of(connection, found)
        if wanted is not None and all(
            version.past.was_gated or version.name == found.stable for version in rising(found, versions, wanted)
        ):
            return {}
        return await suite_digests(self._suites, found.gates)

    async def _move(self, call: Call, decide: Decide) -> Moved:
        """Decide and act in one transaction; or only decide."""
        started = time.perf_counter()
        if call.dry_run:
            async with self._database.read() as connection:
                held = await _held(connection, call.route, call.principal, call.expected_revision)
                decided = await decide(connection, held, await versions_of(connection, held))
            return _moved(held, decided.after, decided, started).model_copy(update={"dry_run": True})
        async with self._database.write(urgent=True) as connection:
            first = await first_answer(connection, call)
            if first is not None:
                return first
            held = await _held(connection, call.route, call.principal, call.expected_revision)
            versions = await versions_of(connection, held)
            decided = await decide(connection, held, versions)
            after = await _apply(connection, decided, versions, call.principal)
            await _audit(connection, held, after, call, needs_load=decided.needs_load)
            moved = _moved(held, after, decided, started)
            await keep_answer(connection, call, moved)
        await self._refresh()
        took_ms = (time.perf_counter() - started) * 1000
        told = {"moved_from": moved.moved_from, "moved_to": moved.moved_to, "needs_load": moved.needs_load}
        log.info("traffic moved", route=after.name, revision=after.revision, took_ms=round(took_ms, 1), **told)
        return moved.model_copy(update={"took_ms": took_ms})

    async def _refresh(self) -> None:
        """Route by the change at once."""
        if self._on_moved is not None:
            await self._on_moved()


def _settled(route: str, action: str, principal: Principal, reason: str | None, expected_revision: int | None) -> Call:
    """A change that moves no traffic."""
    return Call(
        action=action,
        route=route,
        principal=principal,
        reason=stated(reason),
        expected_revision=expected_revision,
    )


def _moved(before: Route, after: Route, decided: Decided, started: float) -> Moved:
    return Moved(
        before=before,
        route=after,
        moved_from=decided.moved_from,
        moved_to=decided.moved_to,
        revision=after.revision,
        took_ms=(time.perf_counter() - started) * 1000,
        needs_load=decided.needs_load,
        marked=decided.marks,
    )


async def _held(connection: AsyncConnection, name: str, principal: Principal, expected_revision: int | None) -> Route:
    """The route inside a transaction, as the caller expects it."""
    route = await get_route(connection, name, project_id=principal.project_id)
    if expected_revision is not None and route.revision != expected_revision:
        raise route_moved(name, expected=expected_revision, found=route.revision)
    return route


async def _apply(
    connection: AsyncConnection, decided: Decided, versions: Sequence[RouteVersion], principal: Principal
) -> Route:
    """Store a move: the route, and what changes of its versions."""
    saved = await save_route(connection, decided.after, actor=principal.actor)
    for version in versions:
        values: dict[str, Any] = {}
        if version.name == decided.arrives:
            values |= {} if version.past.was_stable else {"promoted_at": now()}
            values |= {"gated_at": now()} if decided.is_gated and not version.past.was_gated else {}
        if version.name in decided.marks:
            values["rolled_back_at"] = now()
        if version.name == decided.unmarks:
            values["rolled_back_at"] = None
        if values:
            table = tables.adapter_versions
            await connection.execute(update(table).where(table.c.id == version.id).values(**values))
    return saved


async def _audit(
    connection: AsyncConnection, before: Route, after: Route, call: Call, *, needs_load: bool = False
) -> None:
    consents = {"force": call.force, "needs_load": needs_load}
    await record_audit(
        connection,
        project_id=before.project_id,
        actor=call.principal.actor,
        action=call.action,
        subject=before.name,
        before=before.audited(),
        after=after.audited() | {name: True for name, given in consents.items() if given},
        reason=call.reason,
    )
