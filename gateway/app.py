"""The gateway: data plane and API in one process. `python -m gateway.app --home DIR`.

Builds every object and passes it on; what runs besides requests (the routing table's loop, the recorder's) starts and
stops with the application.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import sys
from importlib.metadata import version
from pathlib import Path

import structlog
import uvloop
from fastapi import FastAPI

from .api import adapters, audit, evaluations, files, fine_tuning, gc, health, jobs, keys, models, routes
from .api.dependencies import Services
from .api.errors import install_error_handlers
from .connections.files import raise_file_limit
from .database import Database, sqlite_file
from .datasets.store import FileStore
from .engine.client import EngineClients
from .errors import GatewayError, Invalid, Unavailable
from .handover import Place
from .jobs.service import JobService
from .jobs.suites import Suites
from .keys import Keys, load_pepper
from .lock_holders import LockWatch
from .logs import configure_logging
from .metrics import Metrics
from .migrations.run import migrate
from .proxy.app import Front, Lifecycle
from .proxy.authentication import Authenticator
from .proxy.bodies import Bodies
from .proxy.checks import Bounds
from .proxy.completions import Completions
from .proxy.cutting import Timeouts
from .proxy.large_bodies import LargeBodies
from .proxy.recorder import Recorder
from .registry.base_family import BaseFamily, load_base_family
from .registry.retirement import Retirement
from .registry.service import Registry
from .retention.service import Retention
from .rollouts.break_glass import BreakGlass
from .rollouts.journal import Journal
from .rollouts.promotion import Promotions
from .routing.snapshot import Snapshot, SnapshotBase
from .routing.store import create_route_for
from .routing.table import RoutingTable
from .server import GatewayServer
from .settings import Settings, load_settings

log = structlog.get_logger(__name__)

_STOP_TIMEOUT_S = 10.0
_LOCK_LOOK_S = 1.0


class Gateway:
    """Every object of the process, and the ASGI application `front` over them."""

    def __init__(self, settings: Settings, *, timeouts: Timeouts | None = None) -> None:
        check_host(settings)
        settings.prepare_directories()
        pepper = load_pepper(settings)
        base = load_base_family(settings.base_model.name, settings.base_model.path)
        self.settings = settings
        self.lifecycle = Lifecycle()
        self.metrics = Metrics()
        self.database = Database(settings.database, must_exist=True)
        self.keys = Keys(self.database, pepper)
        self.table = RoutingTable(self.database, settings.snapshot_path, {base.name: _snapshot_base(base, settings)})
        self.engines = EngineClients()
        self.recorder = Recorder(self.database, self.metrics)
        self.table.on_change(self._forget_old_engines)
        self.large_bodies = LargeBodies(max_body_bytes=settings.limits.request_bytes)
        timeouts = timeouts or Timeouts(request_s=settings.limits.request_timeout_s)
        self.completions = Completions(
            self.table,
            self.engines,
            self.recorder,
            self.metrics,
            bounds=Bounds(base.vocab_size, settings.engine.max_model_len),
            secret=pepper,
            bodies=Bodies(self.large_bodies, max_body_bytes=settings.limits.request_bytes),
            timeouts=timeouts,
        )
        self.services = self._build_services(base, body_timeout_s=timeouts.body_s)
        self.api = build_api(self.services)
        self.front = Front(
            self.api,
            self.completions,
            Authenticator(self.table, pepper, allow_anonymous=settings.auth == "none"),
            self.lifecycle,
            self.metrics,
            loopback_only=settings.auth == "none",
            on_start=self.start,
            on_stop=self.stop,
        )
        self._loops: list[asyncio.Task[None]] = []

    def _build_services(self, base: BaseFamily, *, body_timeout_s: float) -> Services:
        suites = Suites(self.settings)
        file_store = FileStore(self.database, self.settings)
        registry = Registry(self.database, self.settings, base, on_publish=(create_route_for,))
        promotions = Promotions(
            self.database, suites=suites, on_moved=self.table.catch_up, on_cut=self.completions.cut_variants
        )
        journal = Journal(self.settings.journal_path)
        return Services(
            database=self.database,
            settings=self.settings,
            registry=registry,
            retirement=Retirement(self.database, registry),
            keys=self.keys,
            routing=self.table,
            promotions=promotions,
            break_glass=BreakGlass(self.database, self.table, promotions, journal),
            jobs=JobService(self.database, self.settings, registry, file_store, suites),
            files=file_store,
            suites=suites,
            retention=Retention(self.database, self.settings),
            metrics=self.metrics,
            lifecycle=self.lifecycle,
            lock_watch=LockWatch(sqlite_file(self.settings.database)),
            body_timeout_s=body_timeout_s,
        )

    async def start(self) -> None:
        """Open the database, or go on from the saved table without it; then follow the one and fill the other."""
        await self.services.registry.start()
        try:
            await self._open_database()
        except Unavailable as error:
            if not self.table.load_saved():
                raise
            log.error("serving from the saved routing table", error=error.message, revision=self.table.current.revision)
        self._loops = [
            asyncio.create_task(self.table.run()),
            asyncio.create_task(self.services.break_glass.run()),
            asyncio.create_task(self._watch_lock()),
            asyncio.create_task(self.recorder.run()),
        ]
        log.info("gateway is up", url=self.settings.url, auth=self.settings.auth)

    async def _open_database(self) -> None:
        file = sqlite_file(self.settings.database)
        if file is not None and not file.exists() and self.settings.snapshot_path.exists():
            # It was there when the table was saved. An empty one in its place would forget every key and adapter.
            raise Unavailable(
                f"the database {file} is gone; put it back, or remove {self.settings.snapshot_path} to begin anew",
                code="database_lost",
            )
        await migrate(self.settings)
        if self.settings.auth == "keys":
            await self.keys.create_first(_show_once)
        await self.table.refresh()

    async def stop(self) -> None:
        """Store what waits to be stored, close what is open."""
        self.recorder.stop()
        for loop in self._loops[:-1]:  # the recorder ends by itself, after a last flush
            loop.cancel()
        _, late = await asyncio.wait(self._loops, timeout=_STOP_TIMEOUT_S) if self._loops else (set(), set())
        for loop in late:
            loop.cancel()
        if self.recorder.queued:
            log.error("exposures lost: the database could not take them", count=self.recorder.queued)
        self.engines.close()
        await self.large_bodies.stop()
        await self.database.close()
        log.info("gateway is down")

    def server(self, *, owns_process: bool = False) -> GatewayServer:
        """What serves this gateway."""
        return GatewayServer(
            self.front,
            self.settings,
            self.lifecycle,
            self.metrics,
            cut_all=lambda: self.completions.cut_all("shutdown"),
            owns_process=owns_process,
        )

    async def _watch_lock(self) -> None:
        """Look who holds the database, once a second, until cancelled."""
        while True:
            await asyncio.to_thread(self.services.lock_watch.look)
            await asyncio.sleep(_LOCK_LOOK_S)

    def _forget_old_engines(self, snapshot: Snapshot) -> None:
        self.engines.keep_only((replica.id, replica.socket, replica.epoch) for replica in snapshot.replicas)


def _snapshot_base(base: BaseFamily, settings: Settings) -> SnapshotBase:
    return SnapshotBase(base.name, base.digest, base.vocab_size, settings.engine.max_model_len)


def _show_once(raw: str) -> None:
    sys.stdout.write(f"\nAdmin key, shown this once: {raw}\n  export TURNOUT_API_KEY={raw}\n\n")
    sys.stdout.flush()


def check_host(settings: Settings) -> None:
    """Refuse to serve without keys where others can connect."""
    if settings.auth == "keys" or settings.host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise Invalid(
            f"auth is `none` and host is {settings.host!r}, which others can reach: set host to 127.0.0.1, or auth to `keys`",
            code="auth_required",
            param="host",
        )


def build_api(services: Services) -> FastAPI:
    """Everything but the completions."""
    api = FastAPI(title="Turnout", version=version("turnout"), redoc_url=None, redirect_slashes=False)
    api.state.services = services
    install_error_handlers(api, services.metrics)
    for module in (models, files, fine_tuning, adapters, routes, evaluations, jobs, keys, audit, gc, health):
        # `include_router` would build every route once more (0.15 s); they say all about themselves already.
        api.router.routes.extend(module.router.routes)
    return api


def create_app(settings: Settings) -> Front:
    """The ASGI application; it starts and stops its loops by the lifespan protocol."""
    return Gateway(settings).front


async def serve_gateway(settings: Settings) -> None:
    """Serve until told to stop. Raises `Invalid` when it cannot start."""
    raise_file_limit()
    settings.prepare_directories()
    place = Place(settings)
    try:
        gateway = Gateway(settings)
        gateway.api.openapi()  # made once, now: it takes longer than any request may
        server = gateway.server(owns_process=True)
        await server.serve_at(place)
    finally:
        place.close()
    if not server.started:
        raise Unavailable("the gateway did not start; the cause is in its log", code="not_started")


def main() -> None:
    """Entry of the process."""
    parser = argparse.ArgumentParser(prog="python -m gateway.app", description="Serve data plane and API.")
    parser.add_argument("--home", type=Path, help="where the state lives; default: TURNOUT_HOME")
    arguments = parser.parse_args()
    try:
        settings = load_settings(**({"home": arguments.home} if arguments.home else {}))
        configure_logging(settings)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_gateway(settings))
    except GatewayError as error:
        sys.exit(f"gateway: {error.message}")


if __name__ == "__main__":
    main()
