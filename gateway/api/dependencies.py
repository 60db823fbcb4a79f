"""What handlers ask for: the caller, a scope, a service. The caller was authenticated before FastAPI saw the request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from ..database import Database
from ..datasets.store import FileStore
from ..errors import Unauthenticated
from ..jobs.service import JobService
from ..jobs.suites import Suites
from ..keys import Keys, Principal, Scope
from ..lock_holders import LockWatch
from ..metrics import Metrics
from ..proxy.app import PRINCIPAL, Lifecycle
from ..registry.retirement import Retirement
from ..registry.service import Registry
from ..retention.service import Retention
from ..rollouts.break_glass import BreakGlass
from ..rollouts.promotion import Promotions
from ..routing.table import RoutingTable
from ..settings import Settings


@dataclass(frozen=True)
class Services:
    """Every object that handlers use; built once, in `app.py`, and kept at `app.state.services`."""

    database: Database
    settings: Settings
    registry: Registry
    retirement: Retirement
    keys: Keys
    routing: RoutingTable
    promotions: Promotions
    break_glass: BreakGlass
    jobs: JobService
    files: FileStore
    suites: Suites
    retention: Retention
    metrics: Metrics
    lifecycle: Lifecycle
    lock_watch: LockWatch
    body_timeout_s: float


# All are `async` so that FastAPI calls them in the event loop and not in a thread each.


async def caller(request: Request) -> Principal:
    """Who is asking. Missing only if the front were bypassed, and then nobody is let in."""
    return principal_of(request)


def principal_of(request: Request) -> Principal:
    """Who is asking; `Unauthenticated` if the front were bypassed."""
    principal = request.scope.get(PRINCIPAL)
    if not isinstance(principal, Principal):
        raise Unauthenticated("this request was not authenticated")
    return principal


def _with_scope(scope: Scope) -> Callable[[Request], Awaitable[Principal]]:
    async def check(request: Request) -> Principal:
        principal = principal_of(request)
        principal.require(scope)
        return principal

    return check


_admin = _with_scope("admin")
_trainer = _with_scope("train")
# The dependencies that name the caller, with the scope that each needs: `declared` looks here before a body is read.
NEEDED_SCOPE: Mapping[Callable[..., Any] | None, Scope | None] = {
    caller: None,
    _admin: "admin",
    _trainer: "train",
}


def services(request: Request) -> Services:
    """The services of this application."""
    found: Services = request.app.state.services
    return found


Caller = Annotated[Principal, Depends(caller)]
Admin = Annotated[Principal, Depends(_admin)]
Trainer = Annotated[Principal, Depends(_trainer)]


async def _database(request: Request) -> Database:
    return services(request).database


async def _settings(request: Request) -> Settings:
    return services(request).settings


async def _registry(request: Request) -> Registry:
    return services(request).registry


async def _retirement(request: Request) -> Retirement:
    return services(request).retirement


async def _keys(request: Request) -> Keys:
    return services(request).keys


async def _routing(request: Request) -> RoutingTable:
    return services(request).routing


async def _promotions(request: Request) -> Promotions:
    return services(request).promotions


async def _break_glass(request: Request) -> BreakGlass:
    return services(request).break_glass


async def _jobs(request: Request) -> JobService:
    return services(request).jobs


async def _files(request: Request) -> FileStore:
    return services(request).files


async def _suites(request: Request) -> Suites:
    return services(request).suites


async def _retention(request: Request) -> Retention:
    return services(request).retention


async def _metrics(request: Request) -> Metrics:
    return services(request).metrics


async def _lock_watch(request: Request) -> LockWatch:
    return services(request).lock_watch


async def _lifecycle(request: Request) -> Lifecycle:
    return services(request).lifecycle


DatabaseService = Annotated[Database, Depends(_database)]
CurrentSettings = Annotated[Settings, Depends(_settings)]
RegistryService = Annotated[Registry, Depends(_registry)]
RetirementService = Annotated[Retirement, Depends(_retirement)]
KeysService = Annotated[Keys, Depends(_keys)]
RoutingService = Annotated[RoutingTable, Depends(_routing)]
PromotionsService = Annotated[Promotions, Depends(_promotions)]
BreakGlassService = Annotated[BreakGlass, Depends(_break_glass)]
JobsService = Annotated[JobService, Depends(_jobs)]
FilesService = Annotated[FileStore, Depends(_files)]
SuitesService = Annotated[Suites, Depends(_suites)]
RetentionService = Annotated[Retention, Depends(_retention)]
MetricsService = Annotated[Metrics, Depends(_metrics)]
LockWatchService = Annotated[LockWatch, Depends(_lock_watch)]
LifecycleService = Annotated[Lifecycle, Depends(_lifecycle)]
