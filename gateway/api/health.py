"""Is it alive, is it ready, what does it measure, which engines answer."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from math import isinf
from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from sqlalchemy import select

from .. import tables
from ..database import Database
from ..errors import GatewayError
from ..keys import Principal
from ..lease import FRESH_WITHIN_S, silence
from ..lock_holders import LockWatch
from ..metrics import Metrics
from ..proxy.app import Lifecycle
from ..retention.rows import read_deleted, table_rows
from ..routing.census import take_census
from ..routing.table import RoutingTable
from .declared import DeclaredRoute
from .dependencies import (
    BreakGlassService,
    Caller,
    DatabaseService,
    LifecycleService,
    LockWatchService,
    MetricsService,
    RoutingService,
)

router = APIRouter(route_class=DeclaredRoute, tags=["Health"])

# The table is followed ten times a second; a database silent for longer than this is worth telling.
_STALE_AFTER_S = 5.0
# A write takes milliseconds.
HELD_LONG_S = 2.0
# The reason itself quotes the engine's log, which may say anything, and where it lies.
_TOLD_TO_ADMINS = "a key with scope 'admin' is told why"


class Alive(BaseModel, frozen=True):
    """The process answers."""

    status: Literal["alive"] = "alive"


class DatabaseHolder(BaseModel, frozen=True):
    """A process that holds the database's lock for longer than a write takes. `turnout doctor` has its number."""

    process: Literal["controller", "gateway", "supervisor", "turnout", "other"]
    holds: Literal["write", "read"]
    is_stopped: bool = Field(description="a signal stopped it: it lets go when it is continued, or killed")
    seen_for_s: float = Field(description="at every look since then")


class Readiness(BaseModel, frozen=True):
    """Whether completions are served now, and what stands in the way."""

    status: Literal["ready", "not_ready"]
    reason: str | None = None
    database: Literal["ok", "stale"]
    engines_ready: int
    controller: Literal["ok", "silent"] = Field(
        description="`silent`: nobody looks after engines and jobs, and what is said of engines may be long over"
    )
    controller_silent_s: float | None = Field(description="since it last renewed its lease; null: it never had it")
    journalled_rollbacks: int = Field(default=0, description="made without the database, which does not know them yet")
    database_held_by: list[DatabaseHolder] = Field(default=[], description="SQLite: who keeps others from writing")


class Replica(BaseModel, frozen=True):
    """One copy of the engine, as the controller sees it."""

    id: str
    state: str
    reason: str | None
    self_test: str
    batch_noise: float | None = Field(
        description="nats by which batches alone move the base model's answers, measured at the start; null: not yet"
    )
    started_at: datetime | None
    failures: int = Field(description="in a row, since it last served for a while")
    futile_starts: int = Field(description="starts in a row that ended before it served, with no adapter to blame")
    last_failure: str | None = Field(description="why it failed last; stays while it starts again")
    ready_adapters: list[str]


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Alive:
    """Always, if it answers at all."""
    return Alive()


@router.get("/readyz", summary="Are completions served now?", responses={503: {"model": Readiness}})
async def readyz(
    response: Response,
    routing: RoutingService,
    lifecycle: LifecycleService,
    break_glass: BreakGlassService,
    lock_watch: LockWatchService,
) -> Readiness:
    """503 while starting, while no engine is ready, and while draining."""
    found = readiness(routing, lifecycle, journalled=break_glass.open, held_by=_holders(lock_watch))
    if found.status != "ready":
        response.status_code = 503
    return found


def readiness(
    routing: RoutingTable, lifecycle: Lifecycle, *, journalled: int, held_by: list[DatabaseHolder]
) -> Readiness:
    """Decide from what is in memory."""
    engines = len(routing.current.serving(None))
    reason = None
    if lifecycle.is_draining:
        reason = "draining"
    elif not routing.is_loaded:
        reason = "no_routing_table"
    elif not engines:
        reason = "no_engine"
    silent_s = silence(routing.controller_until)
    return Readiness(
        status="not_ready" if reason else "ready",
        reason=reason,
        database="stale" if routing.age_s > _STALE_AFTER_S else "ok",
        engines_ready=engines,
        controller="silent" if silent_s > FRESH_WITHIN_S else "ok",
        controller_silent_s=None if isinf(silent_s) else round(silent_s, 1),
        journalled_rollbacks=journalled,
        database_held_by=held_by,
    )


def _holders(watch: LockWatch) -> list[DatabaseHolder]:
    return [
        DatabaseHolder(
            process=holder.kind, holds=holder.holds, is_stopped=holder.is_stopped, seen_for_s=round(seen_s, 1)
        )
        for holder, seen_s in watch.holders
        if seen_s >= HELD_LONG_S
    ]


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(
    caller: Caller, metrics: MetricsService, routing: RoutingService, database: DatabaseService
) -> Response:
    """In Prometheus' text format. Needs a key of any scope where the server has keys."""
    _show_table(metrics, routing)
    with suppress(GatewayError):  # without a database the last counts stand, and the table's age tells of it
        await _show_census(metrics, database)
    return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _show_table(metrics: Metrics, routing: RoutingTable) -> None:
    metrics.table_revision.set(routing.current.revision)
    metrics.table_age.set(routing.age_s)
    metrics.table_failures.labels("refresh").set(routing.failed_refreshes)
    metrics.table_failures.labels("save").set(routing.failed_saves)
    metrics.table_failures.labels("refused_file").set(routing.refused_files)


async def _show_census(metrics: Metrics, database: Database) -> None:
    census = await take_census(database)
    metrics.set_counts(metrics.versions, census.versions)
    metrics.set_counts(metrics.residency, census.residency)
    metrics.set_counts(metrics.replicas, census.replicas)
    metrics.set_counts(metrics.jobs, census.jobs)
    metrics.set_counts(metrics.verdicts, census.verdicts)
    async with database.read() as connection:
        sizes, deleted = await table_rows(connection), await read_deleted(connection)
    metrics.set_counts(metrics.table_rows, {(name,): count for name, count in sizes.items()})
    metrics.set_counts(metrics.deleted, {(name,): count for name, count in deleted.items()})


@router.get("/api/replicas", summary="List engine replicas")
async def replicas(caller: Caller, database: DatabaseService, routing: RoutingService) -> list[Replica]:
    """Their states, and the adapters that are READY on each. Why an engine failed is told to admins."""
    table = tables.replicas
    ready = {replica.id: sorted(replica.ready) for replica in routing.current.replicas}
    async with database.read() as connection:
        rows = (await connection.execute(select(table).order_by(table.c.id))).mappings().all()
    return [
        Replica(
            id=row["id"],
            state=row["state"],
            reason=_told(row["reason"], caller),
            self_test=row["self_test"],
            batch_noise=row["batch_noise"],
            started_at=row["started_at"],
            failures=row["failures"],
            futile_starts=row["futile_starts"],
            last_failure=_told(row["last_failure"], caller),
            ready_adapters=ready.get(row["id"], []),
        )
        for row in rows
    ]


def _told(reason: str | None, caller: Principal) -> str | None:
    return _TOLD_TO_ADMINS if reason and not caller.allows("admin") else reason
