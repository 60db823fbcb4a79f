"""Move traffic: promote, roll back, split. Each is one transaction with one compare-and-swap and one audit row."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import structlog
from pydantic import BaseModel, Field
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..database import Database, now, record_audit
from ..errors import Conflict, GatewayError, Invalid, Refused
from ..jobs.suites import Suites
from ..jobs.verdicts import Verdict
from ..keys import Principal
from ..routing.models import Route, Variant, check_variants
from ..routing.store import get_route, route_moved, save_route
from .conditions import (
    RouteVersion,
    check_may_serve,
    check_resident,
    check_verified,
    digest_of,
    is_answerable,
    named,
    newest_verdict,
    rising,
    versions_of,
)
from .pointers import Move, Pointers, promote, roll_back

log = structlog.get_logger(__name__)

MAX_VARIANTS = 16
MAX_GATES = 32
MAX_REASON_CHARS = 1_000


class Moved(BaseModel, frozen=True):
    """Traffic moved."""

    route: Route
    moved_from: str = Field(description="what was left: the former stable, or the challengers of a split, by commas")
    moved_to: str
    revision: int
    took_ms: float = Field(description="from the call until this gateway routes by it")
    journalled: bool = Field(default=False, description="this gateway's journal has it; the database is told later")
    needs_load: bool = Field(description="no engine has the target loaded: its requests fail until one has")


class Promotions:
    """The only code that changes where a route's traffic goes."""

    def __init__(
        self,
        database: Database,
        *,
        suites: Suites | None = None,
        on_moved: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._database = database
        self._suites = suites
        self._on_moved = on_moved

    async def promote(
        self,
        route: str,
        target: str | None,
        *,
        force: bool = False,
        reason: str | None = None,
        principal: Principal,
        expected_revision: int | None = None,
    ) -> Moved:
        """All traffic to `target`, or to the candidate.

        Needs a passed gate of every suite for its very digest, or `force` and a reason; and always that it was verified
        and that every ready engine has it loaded.
        """
        started = time.perf_counter()
        reason = _checked_reason(reason, force=force)
        gates = {} if force else await self._gates(route, principal)
        async with self._database.write(urgent=True) as connection:
            held = await _held(connection, route, principal, expected_revision)
            versions = await versions_of(connection, held)
            move = promote(_pointers(held, versions), target, [version.past for version in versions], force=force)
            chosen = named(versions, move.pointers.stable)
            check_verified(chosen)
            await check_resident(connection, chosen)
            if not force:
                await _check_gates(connection, held, chosen, gates, baseline=digest_of(versions, held.stable))
            after = await _apply(connection, held, move, versions, principal)
            await _audit(connection, held, after, "route.promote", reason, principal, force=force)
        return await self._moved(held, after, started, needs_load=False)

    async def rollback(
        self,
        route: str,
        *,
        to: str | None = None,
        force: bool = False,
        reason: str | None = None,
        principal: Principal,
        expected_revision: int | None = None,
    ) -> Moved:
        """Challengers out of a split; without any, all traffic back to `previous`; or to `to`. Waits for no gate and no load.

        It acts on the route as it was when it was called (`expected_revision`, else what a first read finds): of two
        calls at once one wins and the other gets `Conflict`, so that two people do not roll back twice.
        """
        started = time.perf_counter()
        reason = _checked_reason(reason, force=force)
        if expected_revision is None:
            async with self._database.read() as connection:
                expected_revision = (await get_route(connection, route, project_id=principal.project_id)).revision
        async with self._database.write(urgent=True) as connection:
            held = await _held(connection, route, principal, expected_revision)
            versions = await versions_of(connection, held)
            arms = [variant.target for variant in held.variants if variant.weight]
            past = [version.past for version in versions]
            move = roll_back(_pointers(held, versions), past, to=to, force=force, arms=arms)
            after = await _apply(connection, held, move, versions, principal)
            await _audit(connection, held, after, "route.rollback", reason, principal, force=force)
            needs_load = not await is_answerable(connection, versions, after.stable)
        return await self._moved(held, after, started, needs_load=needs_load, withdrawn=move.withdrawn)

    async def set_variants(
        self,
        route: str,
        variants: Sequence[Variant],
        *,
        expected_revision: int | None = None,
        force: bool = False,
        reason: str | None = None,
        principal: Principal,
    ) -> Route:
        """Split the traffic. An arm must be verified and not rolled back.

        One whose share rises must be loaded on every ready engine and, unless it was stable before, have passed the
        route's gates; or `force` and a reason.
        """
        reason = _checked_reason(reason, force=force)
        wanted = tuple(variants)
        check_variants(wanted)
        if len(wanted) > MAX_VARIANTS:
            raise Invalid(f"{len(wanted)} variants; at most {MAX_VARIANTS}", code="too_many_variants", param="variants")
        gates = {} if force else await self._gates(route, principal, wanted)
        async with self._database.write(urgent=True) as connection:
            held = await _held(connection, route, principal, expected_revision)
            versions = await versions_of(connection, held)
            for variant in wanted:
                check_may_serve(held, versions, variant)
            for version in rising(held, versions, wanted):
                await check_resident(connection, version)
                if not (force or version.past.was_stable):
                    await _check_gates(connection, held, version, gates, baseline=digest_of(versions, held.stable))
            after = await save_route(connection, held.model_copy(update={"variants": wanted}), actor=principal.actor)
            await _audit(connection, held, after, "route.set_variants", reason, principal, force=force)
        await self._refresh()
        return after

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
        reason = _checked_reason(reason, force=False)
        async with self._database.write(urgent=True) as connection:
            held = await _held(connection, route, principal, expected_revision)
            if target is not None:
                check_verified(named(await versions_of(connection, held), target))
            after = await save_route(connection, held.model_copy(update={"candidate": target}), actor=principal.actor)
            await _audit(connection, held, after, "route.set_candidate", reason, principal)
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
        reason = _checked_reason(reason, force=False)
        gates = tuple(dict.fromkeys(suites))
        if len(gates) > MAX_GATES:
            raise Invalid(f"{len(gates)} gates; at most {MAX_GATES}", code="too_many_gates", param="suites")
        for name in gates:
            await self._suite_digest(name)
        async with self._database.write(urgent=True) as connection:
            held = await _held(connection, route, principal, expected_revision)
            after = await save_route(connection, held.model_copy(update={"gates": gates}), actor=principal.actor)
            await _audit(connection, held, after, "route.set_gates", reason, principal)
        await self._refresh()
        return after

    async def _gates(
        self, route: str, principal: Principal, wanted: Sequence[Variant] | None = None
    ) -> dict[str, str | None]:
        """The route's suites with their present digests; none for a split by which nothing new gets a share.

        Read before the transaction: hashing a suite may take a while.
        """
        async with self._database.read() as connection:
            found = await get_route(connection, route, project_id=principal.project_id)
            versions = await versions_of(connection, found)
        if wanted is not None and all(version.past.was_stable for version in rising(found, versions, wanted)):
            return {}
        return {name: await self._suite_digest(name) for name in found.gates}

    async def _suite_digest(self, name: str) -> str | None:
        if self._suites is None:
            return None
        return (await asyncio.to_thread(self._suites.find, name)).digest

    async def _moved(
        self, before: Route, after: Route, started: float, *, needs_load: bool, withdrawn: Sequence[str] = ()
    ) -> Moved:
        await self._refresh()
        took_ms = (time.perf_counter() - started) * 1000
        moved_from = ", ".join(withdrawn) or before.stable
        log.info(
            "traffic moved",
            route=after.name,
            moved_from=moved_from,
            moved_to=after.stable,
            revision=after.revision,
            took_ms=round(took_ms, 1),
            needs_load=needs_load,
        )
        return Moved(
            route=after,
            moved_from=moved_from,
            moved_to=after.stable,
            revision=after.revision,
            took_ms=took_ms,
            needs_load=needs_load,
        )

    async def _refresh(self) -> None:
        """Route by the change at once. It is committed: a failure here must not look as if it were not."""
        if self._on_moved is None:
            return
        try:
            await self._on_moved()
        except GatewayError as error:
            log.warning("change is committed, this gateway sees it a little later", error=error.message)


async def _check_gates(
    connection: AsyncConnection,
    route: Route,
    version: RouteVersion,
    digests: Mapping[str, str | None],
    *,
    baseline: str,
) -> None:
    """A verdict counts against the stable that stands now: one against an older stable proves nothing about this."""
    if not route.gates:
        raise Refused(
            f"route {route.name!r} has no gates: name suites with `turnout routes gates`, or use force and a reason",
            code="no_gate",
        )
    if not digests.keys() >= set(route.gates):
        raise Conflict(f"route {route.name!r} was changed meanwhile; try again", code="route_moved")
    for suite in route.gates:
        found = await newest_verdict(
            connection, version, suite, digests[suite], baseline=baseline, project_id=route.project_id
        )
        if found is None:
            raise Refused(
                f"{version.name} was not evaluated on {suite!r} as it is now, against {route.stable}, the present stable: "
                f"run `turnout eval run {version.name} --suite {suite}`",
                code="gate_missing",
            )
        if found != Verdict.PASSED:
            raise Refused(f"{version.name} did not pass {suite!r}: the verdict is {found}", code=f"gate_{found}")


def _checked_reason(reason: str | None, *, force: bool) -> str | None:
    reason = (reason or "").strip() or None
    if force and reason is None:
        raise Invalid("`force` needs a `reason`; it goes into the audit log", code="reason_required", param="reason")
    if reason is not None and len(reason) > MAX_REASON_CHARS:
        raise Invalid(f"the reason is over {MAX_REASON_CHARS} characters", code="reason_too_long", param="reason")
    return reason


async def _held(connection: AsyncConnection, name: str, principal: Principal, expected_revision: int | None) -> Route:
    """The route inside a transaction, as the caller expects it."""
    route = await get_route(connection, name, project_id=principal.project_id)
    if expected_revision is not None and route.revision != expected_revision:
        raise route_moved(name, expected=expected_revision, found=route.revision)
    return route


def _pointers(route: Route, versions: Sequence[RouteVersion]) -> Pointers:
    # A route exists since its adapter's first version, and versions of one adapter share their base.
    return Pointers(
        base=versions[0].base_model, stable=route.stable, previous=route.previous, candidate=route.candidate
    )


async def _apply(
    connection: AsyncConnection, route: Route, move: Move, versions: Sequence[RouteVersion], principal: Principal
) -> Route:
    """Store a move: the pointers, all traffic to the new stable, and the marks."""
    pointers = move.pointers
    after = route.model_copy(
        update={
            "stable": pointers.stable,
            "previous": pointers.previous,
            "candidate": pointers.candidate,
            "variants": (Variant(target=pointers.stable, weight=100),),
        }
    )
    saved = await save_route(connection, after, actor=principal.actor)
    for version in versions:
        values: dict[str, Any] = {}
        if version.name == pointers.stable and not version.past.was_stable:
            values["promoted_at"] = now()
        if version.name in move.marks:
            values["rolled_back_at"] = now()
        if version.name == move.unmarks:
            values["rolled_back_at"] = None
        if values:
            table = tables.adapter_versions
            await connection.execute(update(table).where(table.c.id == version.id).values(**values))
    return saved


async def _audit(
    connection: AsyncConnection,
    before: Route,
    after: Route,
    action: str,
    reason: str | None,
    principal: Principal,
    *,
    force: bool = False,
) -> None:
    await record_audit(
        connection,
        project_id=before.project_id,
        actor=principal.actor,
        action=action,
        subject=before.name,
        before=_shown(before),
        after=_shown(after) | ({"force": True} if force else {}),
        reason=reason,
    )


def _shown(route: Route) -> dict[str, Any]:
    return route.model_dump(mode="json", include={"revision", "stable", "previous", "candidate", "variants", "gates"})
