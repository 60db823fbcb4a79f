"""The life of one engine replica: started, tested, serving, found dead or hung, started again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import assert_never

import structlog
from sqlalchemy import RowMapping, select, update

from .. import tables
from ..database import Database, bump_revision
from ..errors import GatewayError
from ..logs import Seldom
from ..registry.models import ReplicaState
from ..registry.service import Registry
from ..settings import Settings
from .admin import EngineAdmin, EngineRefused, NotFinite
from .evidence import Evidence
from .failures import Failures, last_line, told, waits_for
from .fleet import Fleet
from .lifecycle import Sight, backoff_s, decide
from .models import ReplicaProcess, ReplicaSpec
from .probe import Fault, Prober
from .pulse import Pulse
from .reconciler import Converger, LoadLedger, Poisoned, Session, StaleEpoch
from .replica_rows import begin_row, note_failures
from .self_test import SelfTest, run_self_test, self_test_name, write_adapter

log = structlog.get_logger(__name__)

# An engine that served this long before it died did not die of its start.
STABLE_AFTER_S = 120.0
# A controller that was itself stopped for longer than this knows nothing of the engine's silence.
_MAX_GAP_S = 3.0
_IDLE_S = 0.25


class ReplicaKeeper:
    """Keeps one replica alive and filled. `tick` often; everything slow runs beside it. `tell` gets sentences for people."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        registry: Registry,
        fleet: Fleet,
        spec: ReplicaSpec,
        *,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._database = database
        self._settings = settings
        self._registry = registry
        self._fleet = fleet
        self._spec = spec
        self._tell = tell
        self._converger = Converger(database, settings, registry)
        self._state = ReplicaState.STOPPED
        self._epoch = ""
        self._started_at = self._served_at = self._not_before = self._ticked_at = 0.0
        self._failures = Failures()
        self._reports = Seldom()
        self._evidence = Evidence()
        self._admin: EngineAdmin | None = None
        self._pulse: Pulse | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._is_tested = self._is_restored = False
        self._fault: str | None = None

    async def start(self) -> None:
        """Take over what an earlier controller left: a running engine goes on serving, untouched."""
        process = await self._look()
        row = await self._row()
        if process.state != "running" or row is None or row["epoch"] != process.epoch:
            return
        same = await self._fleet.ensure(self._spec)
        if same.epoch != process.epoch:  # its arguments are others now
            await self._begin(same.epoch)
            return
        self._state, self._epoch = ReplicaState(row["state"]), process.epoch
        self._failures = Failures(row["failures"], row["futile_starts"], row["last_failure"])
        self._is_tested = row["self_test"] in ("passed", "skipped")
        if self._state in (ReplicaState.FAILED, ReplicaState.STOPPED):
            await self._fleet.stop(self._spec.id, grace_s=0)
            return
        log.info("engine adopted", replica=self._spec.id, epoch=self._epoch, state=self._state)
        self._served_at = time.monotonic()
        self._watch()

    async def close(self) -> None:
        """Stop looking; the engine goes on."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._admin is not None:
            await self._admin.close()
            self._admin = None

    async def tick(self) -> None:
        """One look and at most one step."""
        seen = self._sight(await self._look())
        decision = decide(seen, self._settings.engine)
        match decision.step:
            case "wait":
                await self._wait(seen)
            case "start":
                await self._start_process()
            case "test":
                await self._set_state(ReplicaState.TESTING, self_test="running")
                self._begin_work()
            case "serve":
                await self._set_state(ReplicaState.READY)
                await self._note(self._failures.once_served())
                self._served_at = time.monotonic()
                self._evidence.begin_pauses(self._served_at)
                log.info("engine ready", replica=self._spec.id, after_s=round(seen.age_s, 1))
            case "fail":
                await self._fail(decision.reason)
            case unreachable:
                assert_never(unreachable)

    async def _wait(self, seen: Sight) -> None:
        """Nothing to do but to say so now and then, and to forget failures that are long over."""
        goal = waits_for(self._state, is_tested=self._is_tested)
        if goal is not None and self._reports.is_due(seen.age_s):
            last = await asyncio.to_thread(last_line, Path(self._spec.log))
            log.info(
                "waiting for the engine",
                replica=self._spec.id,
                waited_s=round(seen.age_s),
                waits_for=goal,
                log_says=last,
            )
        served_s = time.monotonic() - self._served_at
        if self._state is ReplicaState.READY and served_s > STABLE_AFTER_S and self._failures.in_a_row:
            await self._note(Failures())

    def _sight(self, process: ReplicaProcess) -> Sight:
        clock = time.monotonic()
        pulse = self._pulse
        if pulse is not None:
            pulse.note_usage(process.usage)
            if clock - self._ticked_at > _MAX_GAP_S:
                pulse.forgive()
        self._ticked_at = clock
        return Sight(
            state=self._state,
            process=process.state if process.epoch == self._epoch else "exited",
            exit_code=process.exit_code,
            health=pulse.health if pulse else "unknown",
            age_s=clock - self._started_at,
            silent_s=pulse.silent_s if pulse else 0.0,
            fruitless_s=pulse.fruitless_s if pulse else 0.0,
            is_busy=pulse is not None and pulse.is_busy,
            has_worked=pulse is None or pulse.has_worked,
            wait_s=max(0.0, self._not_before - clock),
            is_tested=self._is_tested,
            is_restored=self._is_restored,
            fault=self._fault,
        )

    async def _start_process(self) -> None:
        try:
            process = await self._fleet.ensure(self._spec)
        except GatewayError as error:
            self._epoch = ""  # of no process: without a row nobody would learn why
            await begin_row(self._database, self._spec, self._epoch, self._failures)
            await self._fail(error.message)
            return
        await self._begin(process.epoch)

    async def _begin(self, epoch: str) -> None:
        await begin_row(self._database, self._spec, epoch, self._failures)
        self._state, self._epoch = ReplicaState.STARTING, epoch
        self._is_tested = self._is_restored = False
        self._fault = None
        log.info("engine started", replica=self._spec.id, epoch=epoch)
        self._watch()

    def _watch(self) -> None:
        """Look after the process of the present epoch."""
        self._started_at = self._ticked_at = time.monotonic()
        self._reports = Seldom()
        self._admin = EngineAdmin(self._spec.socket, self._settings.base_model.name)
        # One that was adopted has served already; the allowance of the first work was its first controller's to give.
        has_worked = self._state is ReplicaState.READY
        self._pulse = Pulse(self._admin, self._settings.engine, has_worked=has_worked)
        self._tasks = [asyncio.create_task(self._pulse.run(), name="pulse")]
        if self._state in (ReplicaState.TESTING, ReplicaState.READY):
            self._begin_work()

    def _begin_work(self) -> None:
        if self._admin is None or self._pulse is None:
            raise RuntimeError("work on an engine that nobody watches")
        self._pulse.watches_core = True
        ledger = LoadLedger(self._settings.run_dir / f"{self._spec.id}.loads", self._epoch)
        session = Session(self._spec.id, self._epoch, self._admin, Prober(self._admin), ledger, self._evidence)
        session.has_passed_test = self._is_tested and self._settings.engine.self_test
        self._tasks.append(asyncio.create_task(self._work(session), name="converge"))

    async def _work(self, session: Session) -> None:
        """Self-test once, then converge for ever."""
        while True:
            try:
                if not self._is_tested:
                    await self._self_test(session)
                    continue
                look = await self._converger.converge(session)
                self._is_restored = self._is_restored or look.is_restored
                if not look.is_done:
                    continue
            except Poisoned as error:
                self._fault = error.message
                return
            except StaleEpoch:
                return
            except GatewayError as error:
                log.warning("adapters not converged; trying again", replica=session.replica_id, error=error.message)
            except Exception:
                log.exception("adapters not converged; trying again", replica=session.replica_id)
            if self._fault is not None:
                return
            await asyncio.sleep(_IDLE_S)

    async def _self_test(self, session: Session) -> None:
        if not self._settings.engine.self_test:
            await self._set_state(self._state, self_test="skipped")
            self._is_tested = True
            return
        began = time.monotonic()
        shapes = self._registry.base.module_shapes
        directory = await asyncio.to_thread(write_adapter, self._settings.home / "selftest", shapes)
        for slot in range(self._settings.engine.max_loras):
            session.ledger.add(self_test_name(directory, slot))
        try:
            found = await run_self_test(session.admin, directory, self._settings.engine)
        except (EngineRefused, NotFinite) as error:
            found = SelfTest(Fault(code="self_test_failed", reason=error.message))
        await self._set_state(
            self._state, self_test="failed" if found.fault else "passed", batch_noise=found.batch_noise
        )
        log.info(
            "self-test done", replica=session.replica_id, took_s=round(time.monotonic() - began, 2), **asdict(found)
        )
        if found.fault is not None:
            self._fault = f"{found.fault.code}: {found.fault.reason}"
            return
        if self._pulse is not None:
            self._pulse.has_worked = True  # the test was its first work
        self._is_tested = session.has_passed_test = True

    async def _fail(self, reason: str) -> None:
        """Traffic stops first, then what is left of the process, then the guilty are looked for."""
        log.error("engine failed", replica=self._spec.id, reason=reason, log=self._spec.log)
        last = await asyncio.to_thread(last_line, Path(self._spec.log))
        has_served = self._state is ReplicaState.READY
        full = f"{reason}; its log {self._spec.log} ends: {last}"
        await self._set_state(ReplicaState.FAILED, reason=full)
        await self.close()
        self._pulse = None
        await self._fleet.stop(self._spec.id, grace_s=0)
        is_blamed = await self._suspect()
        await self._note(self._failures.after(full, has_served=has_served, is_blamed=is_blamed))
        pause = backoff_s(self._failures.in_a_row)
        self._not_before = time.monotonic() + pause
        self._tell(told(f"{reason}; its last words: {last}", self._failures, log=self._spec.log, pause_s=pause))
        if pause:
            failures = self._failures.in_a_row
            log.info("engine restarts after a pause", replica=self._spec.id, pause_s=pause, failures=failures)

    async def _suspect(self) -> bool:
        """Versions that were on their way in when the engine died; who is there again and again is out. Whether any was.

        The others come first at the next start: what an engine dies of may be too little memory, and not the last one in.
        """
        names, has_neighbour = await self._converger.suspects(self._spec.id)
        has_neighbour = has_neighbour or (self._is_tested and self._settings.engine.self_test)
        for name in names:
            found = self._evidence.add(
                name, "death", is_alone=len(names) == 1, has_neighbour=has_neighbour, now=time.monotonic()
            )
            if found.is_proven:
                reason = f"the engine died {found.deaths} times while loading or probing it"
                await self._converger.quarantine(name, Fault(code="engine_died", reason=reason))
        return bool(names)

    async def _note(self, failures: Failures) -> None:
        """Keep the count where everybody sees it."""
        if failures == self._failures:
            return
        await note_failures(self._database, self._spec, self._epoch, failures)
        self._failures = failures

    async def _set_state(
        self,
        state: ReplicaState,
        *,
        reason: str | None = None,
        self_test: str | None = None,
        batch_noise: float | None = None,
    ) -> None:
        table = tables.replicas
        values: dict[str, object] = {"state": state, "reason": reason, "revision": table.c.revision + 1}
        if self_test is not None:
            values["self_test"] = self_test
        if batch_noise is not None:
            values["batch_noise"] = batch_noise
        async with self._database.write() as connection:
            mine = (table.c.id == self._spec.id) & (table.c.epoch == self._epoch)
            await connection.execute(update(table).where(mine).values(values))
            await bump_revision(connection)
        self._state = state

    async def _row(self) -> RowMapping | None:
        async with self._database.read() as connection:
            query = select(tables.replicas).where(tables.replicas.c.id == self._spec.id)
            return (await connection.execute(query)).mappings().one_or_none()

    async def _look(self) -> ReplicaProcess:
        found = [process for process in await self._fleet.replicas() if process.id == self._spec.id]
        return found[0] if found else ReplicaProcess(id=self._spec.id, state="absent")
