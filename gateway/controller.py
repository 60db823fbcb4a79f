"""The controller: one process that keeps engines filled and jobs moving. `python -m gateway.controller --home DIR`.

Builds every object of the control loops. Several may run over one database; the one with the lease acts. When it ends,
whether asked to or not, its children go on: the next controller adopts them, and `stop_children` ends them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import structlog
from sqlalchemy import delete, update

from . import tables
from .database import Database, bump_revision
from .engine.fleet import LOCAL_REPLICA, LocalFleet, engine_spec
from .engine.replicas import ReplicaKeeper
from .engine.residency_rows import names_held
from .errors import GatewayError
from .jobs.launch import attempt_directory
from .jobs.local import PROCESS_KIND
from .jobs.output import LOG_FILE
from .jobs.reconciler import JobReconciler
from .jobs.suites import Suites
from .keys import Keys, load_pepper
from .lease import Lease, LeaseLost
from .logs import configure_logging
from .migrations.run import migrate
from .processes import Child, ProcessTable, bound_log, home_marker
from .registry.base_family import load_base_family
from .registry.models import ReplicaState
from .registry.retirement import Retirement
from .registry.service import Registry
from .retention.service import Retention
from .routing.store import create_route_for
from .settings import Settings, load_settings

log = structlog.get_logger(__name__)

ENGINE_TICK_S = 0.25
JOBS_TICK_S = 0.5
LOGS_TICK_S = 5.0
RETIRED_TICK_S = 2.0
STOP_GRACE_S = 15.0


class Controller:
    """Every object of the process, and the loops over them."""

    def __init__(self, settings: Settings) -> None:
        settings.prepare_directories()
        self._settings = settings
        self.database = Database(settings.database)
        self.processes = ProcessTable(self.database, home_marker(settings.home))
        self.lease = Lease(self.database)
        self.database.fence_with(self.lease.fence)
        base = load_base_family(settings.base_model.name, settings.base_model.path)
        self._registry = Registry(self.database, settings, base, on_publish=(create_route_for,))
        self._retirement = Retirement(self.database, self._registry)
        self._fleet = LocalFleet(self.processes)
        self._jobs = JobReconciler(
            self.database,
            settings,
            self.processes,
            self._registry,
            Keys(self.database, load_pepper(settings)),
            Suites(settings),
        )
        self._retention = Retention(self.database, settings)

    async def run(self) -> None:
        """Until cancelled: wait for the lease, act for as long as it lasts, wait again."""
        await migrate(self._settings)
        try:
            while True:
                await self.lease.acquire()
                try:
                    await self._act()
                except* LeaseLost as lost:
                    log.warning("no longer acting", reason=str(lost.exceptions[0]))
        finally:
            with contextlib.suppress(GatewayError):
                await self.lease.release()
            await self.database.close()

    async def _act(self) -> None:
        """Everything that only the holder of the lease may do. Ends with `LeaseLost`, or by being cancelled."""
        spec = engine_spec(self._settings)
        keeper = ReplicaKeeper(
            self.database, self._settings, self._registry, self._fleet, spec, tell=_say_on_the_terminal
        )
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.lease.keep())
                await self._until_done("adoption", self.processes.adopt)
                await self._until_done("registry", self._registry.start)
                if self._settings.engine.enabled:
                    await self._until_done("engine", keeper.start)
                    group.create_task(self._loop("engine", keeper.tick, ENGINE_TICK_S))
                else:
                    await self._until_done("engine", self._without_engine)
                group.create_task(self._loop("jobs", self._jobs.tick, JOBS_TICK_S))
                group.create_task(self._loop("logs", self._bound_logs, LOGS_TICK_S))
                group.create_task(self._loop("retired", self._remove_retired, RETIRED_TICK_S))
                group.create_task(self._loop("retention", self._retention.tick, self._settings.retention.interval_s))
        finally:
            await keeper.close()

    async def _bound_logs(self) -> None:
        """A child that runs for months fills no disk with what it says."""
        for child in await self.processes.children():
            await asyncio.to_thread(bound_log, child_log(self._settings, child))

    async def _remove_retired(self) -> None:
        """The bytes of retired versions go as soon as no engine can read them again."""
        await self._retirement.remove_unneeded_bytes(partial(names_held, run_dir=self._settings.run_dir))

    async def _without_engine(self) -> None:
        await self._fleet.stop(LOCAL_REPLICA, grace_s=STOP_GRACE_S)
        await forget_engines(self.database)

    async def _until_done(self, name: str, step: Callable[[], Awaitable[object]]) -> None:
        """Take a step of the start, again and again while the state cannot be reached."""
        while True:
            self.lease.check()
            try:
                await step()
                return
            except LeaseLost:
                raise
            except GatewayError as error:
                log.warning("start of a loop failed; trying again", loop=name, error=error.message)
            await asyncio.sleep(JOBS_TICK_S)

    async def _loop(self, name: str, tick: Callable[[], Awaitable[None]], interval_s: float) -> None:
        """Tick for ever. A tick's failure is logged and the next one tries again."""
        while True:
            self.lease.check()
            try:
                await tick()
            except LeaseLost:
                raise
            except GatewayError as error:
                log.warning("tick failed", loop=name, code=error.code, error=error.message)
            except Exception:
                log.exception("tick failed", loop=name)
            await asyncio.sleep(interval_s)


def _say_on_the_terminal(text: str) -> None:
    """Between the supervisor's sentences: it opens no database, so it does not know why an engine failed."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def child_log(settings: Settings, child: Child) -> Path:
    """Where a child's output goes: an engine's by its name, a job's into the directory of the attempt."""
    if child.kind == PROCESS_KIND:
        return attempt_directory(settings, child.id.removesuffix(f".{child.attempt}"), child.attempt) / LOG_FILE
    return settings.logs_dir / f"{child.id}.log"


async def forget_engines(database: Database) -> None:
    """Say that no engine runs, so that gateways send nothing to one."""
    async with database.write() as connection:
        await connection.execute(delete(tables.residency))
        nothing = {"reason": None, "failures": 0, "futile_starts": 0, "last_failure": None}
        await connection.execute(update(tables.replicas).values(state=ReplicaState.STOPPED, **nothing))
        await bump_revision(connection)


async def stop_children(settings: Settings, *, grace_s: float = STOP_GRACE_S) -> None:
    """End the engine, the jobs and everything that they started. For when no controller runs."""
    database = Database(settings.database)
    try:
        with contextlib.suppress(GatewayError):
            await forget_engines(database)
        await ProcessTable(database, home_marker(settings.home)).stop_all(grace_s)
    finally:
        await database.close()


async def serve_controller(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    running = asyncio.ensure_future(Controller(settings).run())
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await running
    log.info("controller is down; its children go on")


def main() -> None:
    """Entry of the process."""
    parser = argparse.ArgumentParser(prog="python -m gateway.controller", description="Run the control loops.")
    parser.add_argument("--home", type=Path, help="where the state lives; default: TURNOUT_HOME")
    arguments = parser.parse_args()
    try:
        settings = load_settings(**({"home": arguments.home} if arguments.home else {}))
        configure_logging(settings)
        asyncio.run(serve_controller(settings))
    except GatewayError as error:
        sys.exit(f"controller: {error.message}")


if __name__ == "__main__":
    main()
