"""Routes: where a name's traffic goes, and the moves of it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header
from pydantic import BaseModel, ConfigDict, Field

from ..keys import Principal
from ..rollouts.models import Moved, RouteMoved
from ..routing.models import Route, Variant
from ..routing.store import get_route, list_routes
from ..routing.table import RoutingTable
from .declared import DeclaredRoute
from .dependencies import Admin, BreakGlassService, Caller, DatabaseService, PromotionsService, RoutingService

router = APIRouter(route_class=DeclaredRoute, prefix="/api/routes", tags=["Routes"])

_MAX_VARIANTS = 64
_MAX_SUITES = 64
_DRY_RUN = Field(default=False, description="answer what would move, and move nothing")

Revision = Annotated[int | None, Field(ge=1, le=2**31 - 1)]
IdempotencyKey = Annotated[
    str | None,
    Header(description="any text, new for each move: a call that is repeated with it gets the first answer, for a day"),
]


class VariantsRequest(BaseModel):
    """How to split the traffic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variants: list[Variant] = Field(max_length=_MAX_VARIANTS)
    tries: list[str] | None = Field(
        default=None,
        max_length=_MAX_VARIANTS,
        description="arms that a rollback takes back; left out: every arm but stable; empty: none is tried",
    )
    force: bool = Field(
        default=False, description="also arms whose gates did not pass or that were rolled back; needs a reason"
    )
    expected_revision: Revision = Field(default=None, description="refuse if the route has moved since")
    reason: str | None = None
    dry_run: bool = _DRY_RUN


class GatesRequest(BaseModel):
    """Which suites a version must pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suites: list[str] = Field(max_length=_MAX_SUITES)
    expected_revision: Revision = None
    reason: str | None = None


class CandidateRequest(BaseModel):
    """Which version comes next; null for none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str | None
    expected_revision: Revision = None
    reason: str | None = None


class PromoteRequest(BaseModel):
    """What to send all traffic to; without a target the candidate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    target: str | None = None
    force: bool = False
    reason: str | None = None
    expected_revision: Revision = None
    dry_run: bool = _DRY_RUN


class RollbackRequest(BaseModel):
    """Where to go back to; without `to` the trial ends, and if there is none stable returns to previous."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    to: str | None = Field(default=None, description="a version, the base model, or support@previous past a trial")
    force: bool = Field(default=False, description="also to a version that was rolled back itself; needs a reason")
    further: bool = Field(default=False, description="although the last move was a rollback already")
    accept_load: bool = Field(
        default=False, description="also onto a version that is not loaded: its requests fail until it is"
    )
    cut: bool = Field(default=False, description="end answers of what is left that still run, with an error")
    reason: str | None = None
    expected_revision: Revision = Field(default=None, description="the revision that you saw; a repeat moves nothing")
    break_glass: bool = Field(
        default=False, description="although the database is locked or gone: journalled on disk, told to it later"
    )
    dry_run: bool = _DRY_RUN


@router.get("", summary="List routes")
async def all_routes(caller: Caller, database: DatabaseService) -> list[Route]:
    """Every route of the caller's project."""
    async with database.read() as connection:
        return await list_routes(connection, project_id=caller.project_id)


@router.get("/{name}", summary="Look a route up")
async def one_route(name: str, caller: Caller, database: DatabaseService) -> Route:
    """The route as it is now."""
    async with database.read() as connection:
        return await get_route(connection, name, project_id=caller.project_id)


@router.put("/{name}/variants", summary="Split traffic between variants")
async def set_variants(
    name: str,
    request: VariantsRequest,
    caller: Admin,
    promotions: PromotionsService,
    idempotency_key: IdempotencyKey = None,
) -> RouteMoved:
    """Sticky: units move only as far as the weights make them. A version's share rises by passed gates, or by `force`."""
    return await promotions.set_variants(
        name,
        request.variants,
        tries=request.tries,
        force=request.force,
        expected_revision=request.expected_revision,
        reason=request.reason,
        principal=caller,
        idempotency_key=idempotency_key,
        dry_run=request.dry_run,
    )


@router.put("/{name}/candidate", summary="Name the version that comes next")
async def set_candidate(name: str, request: CandidateRequest, caller: Admin, promotions: PromotionsService) -> Route:
    """Engines load it; traffic stays where it is."""
    return await promotions.set_candidate(
        name, request.target, expected_revision=request.expected_revision, reason=request.reason, principal=caller
    )


@router.put("/{name}/gates", summary="Name the suites a version must pass")
async def set_gates(name: str, request: GatesRequest, caller: Admin, promotions: PromotionsService) -> Route:
    """From now on; what is stable stays so."""
    return await promotions.set_gates(
        name, request.suites, expected_revision=request.expected_revision, reason=request.reason, principal=caller
    )


@router.post("/{name}/promote", summary="Send all traffic to a version")
async def promote(
    name: str,
    request: PromoteRequest,
    caller: Admin,
    promotions: PromotionsService,
    idempotency_key: IdempotencyKey = None,
) -> Moved:
    """Needs passed gates, or `force` and a reason."""
    return await promotions.promote(
        name,
        request.target,
        force=request.force,
        reason=request.reason,
        principal=caller,
        expected_revision=request.expected_revision,
        idempotency_key=idempotency_key,
        dry_run=request.dry_run,
    )


@router.post("/{name}/rollback", summary="Send all traffic back")
async def rollback(
    name: str,
    request: RollbackRequest,
    caller: Admin,
    promotions: PromotionsService,
    break_glass: BreakGlassService,
    routing: RoutingService,
    idempotency_key: IdempotencyKey = None,
) -> Moved:
    """A flip of pointers, bound to the route as it was when this request came in."""
    if request.break_glass:
        return await break_glass.rollback(
            name,
            to=request.to,
            force=request.force,
            further=request.further,
            accept_load=request.accept_load,
            cut=request.cut,
            reason=request.reason,
            principal=caller,
            expected_revision=request.expected_revision,
            idempotency_key=idempotency_key,
            dry_run=request.dry_run,
        )
    return await promotions.rollback(
        name,
        to=request.to,
        force=request.force,
        further=request.further,
        accept_load=request.accept_load,
        cut=request.cut,
        reason=request.reason,
        principal=caller,
        expected_revision=request.expected_revision or _revision_now(routing, name, caller),
        idempotency_key=idempotency_key,
        dry_run=request.dry_run,
    )


def _revision_now(routing: RoutingTable, name: str, caller: Principal) -> int | None:
    route = routing.current.routes.get(name)
    return route.revision if route is not None and route.project_id == caller.project_id else None
