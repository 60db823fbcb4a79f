"""Brings an engine to what it should hold, step by step: verify, load, probe, tell the gateways."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..database import Database, bump_revision, now
from ..errors import Conflict, Refused, Unavailable
from ..registry.models import ResidencyState, VersionState
from ..registry.reference import Reference
from ..registry.service import Registry
from ..settings import Settings
from .admin import EngineAdmin, EngineFailed, EngineRefused, NotFinite
from .models import Resident, Wanted
from .plan import Load, Observed, Probe, Refuse, RouteTargets, Unload, Withdraw, by_priority, plan
from .probe import Fault, Prober, read_reference

log = structlog.get_logger(__name__)

ACTOR = "controller"
# Gateways look for a new table ten times a second; after this long none of them still sends traffic to what left it.
SETTLE_S = 1.0
# Probes of one version that a living engine may fail before the version is held to be the cause.
MAX_FAILURES = 3
# How long files that are damaged, or that cannot be read, are left alone before they are hashed again: twice as long each time.
FIRST_LOOK_S = 1.0
LATEST_LOOK_S = 30.0
FINAL_JOB_STATES = ("succeeded", "failed", "cancelled")


class StaleEpoch(Conflict):
    """The engine was started anew meanwhile: what was seen of the old one is worth nothing."""

    code = "stale_epoch"


class Poisoned(Conflict):
    """The engine computes nonsense for everybody; only a restart cleans its cache."""

    code = "engine_poisoned"


class LoadLedger:
    """Names ever loaded since one start of an engine. On disk, because a controller may die and the engine live on."""

    def __init__(self, path: Path, epoch: str) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.is_file() else []
        self.names = set(lines[1:]) if lines[:1] == [epoch] else set()
        if lines[:1] != [epoch]:
            path.write_text(f"{epoch}\n")

    def add(self, name: str) -> None:
        """Note a name before it is loaded: a load that fails takes room too."""
        if name not in self.names:
            with self._path.open("a") as file:
                file.write(f"{name}\n")
            self.names.add(name)


@dataclass(slots=True)
class Session:
    """One start of one engine, and what is remembered of it."""

    replica_id: str
    epoch: str
    admin: EngineAdmin
    prober: Prober
    ledger: LoadLedger
    left_at: dict[str, float] = field(default_factory=dict)  # monotonic
    failures: Counter[str] = field(default_factory=Counter)
    # Versions whose files are damaged or cannot be read: how often in a row, and when to look again (monotonic).
    unread: Counter[str] = field(default_factory=Counter)
    look_at: dict[str, float] = field(default_factory=dict)


class Converger:
    """Brings one replica's adapters to what is wanted, one load at a time."""

    def __init__(self, database: Database, settings: Settings, registry: Registry) -> None:
        self._database = database
        self._settings = settings
        self._registry = registry

    @property
    def _capacity(self) -> int:
        return self._settings.engine.max_cpu_loras - 1  # a load takes its place before another one's is given up

    async def converge(self, session: Session) -> bool:
        """One look, all cheap steps, and the most needed load or probe. Whether everything is as it should be."""
        desired = await self._desired()
        steps = plan(desired, await self._observe(session))
        for step in steps:
            match step:
                case Withdraw():
                    await self._withdraw(session, step.engine_name)
                case Unload():
                    await self._database.check_fence()
                    await session.admin.unload(step.engine_name)
                    log.info("adapter unloaded", replica=session.replica_id, adapter=step.engine_name)
                case Refuse():
                    await self._refuse_for_room(session, step.wanted)
                case Load() | Probe():
                    pass
        heavy = [step for step in steps if isinstance(step, Load | Probe)]
        if heavy:
            await self._bring(session, heavy[0])
        return not heavy

    async def suspects(self, replica_id: str) -> list[str]:
        """Engine names that were being loaded or probed, as the table has it."""
        async with self._database.read() as connection:
            rows = await _rows(connection, replica_id)
        return [name for name, row in rows.items() if row.state in (ResidencyState.LOADING, ResidencyState.PROBING)]

    async def quarantine(self, engine_name: str, fault: Fault) -> None:
        """Condemn the version of this engine name, for good."""
        for version in await self._registry.versions(states={VersionState.VERIFIED}):
            if version.engine_name == engine_name:
                await self._condemn(version.id, fault)

    async def _desired(self) -> list[Wanted]:
        versions = await self._registry.versions(states={VersionState.VERIFIED})
        if not versions:
            return []
        routes, jobs = tables.routes, tables.jobs
        unfinished = jobs.c.kind.in_(("evaluation",)) & jobs.c.state.not_in(FINAL_JOB_STATES)
        async with self._database.read() as connection:
            found = (await connection.execute(select(routes))).mappings().all()
            specs = (
                (await connection.execute(select(jobs.c.spec).where(unfinished).order_by(jobs.c.id))).scalars().all()
            )
        targets = [
            RouteTargets(
                row["stable"],
                row["previous"],
                tuple(variant["target"] for variant in row["variants"] if variant["weight"] > 0),
                row["candidate"],
            )
            for row in found
        ]
        evaluated = [name for spec in specs for name in (spec.get("target"), spec.get("stable")) if name]
        return [
            Wanted(version=version, directory=str(self._registry.directory(version)))
            for version in by_priority(versions, targets, evaluated)
        ]

    async def _observe(self, session: Session) -> Observed:
        loaded = await session.admin.models()
        async with self._database.read() as connection:
            rows = await _rows(connection, session.replica_id)
        for name in [name for name, at in session.left_at.items() if time.monotonic() - at >= SETTLE_S]:
            del session.left_at[name]
        return Observed(
            loaded=loaded,
            rows=rows,
            ever_loaded=frozenset(session.ledger.names),
            capacity=self._capacity,
            leaving=set(session.left_at),
            unreadable={name for name, at in session.look_at.items() if time.monotonic() < at},
        )

    async def _bring(self, session: Session, step: Load | Probe) -> None:
        one = step.wanted
        try:
            reference = await asyncio.to_thread(self._check, one, with_files=isinstance(step, Load))
        except (Refused, Unavailable) as error:
            await self._put_off(session, one, error)
            return
        session.unread.pop(one.engine_name, None)
        try:
            if isinstance(step, Load):
                await self._load(session, one)
            await self._mark(session, one.engine_name, ResidencyState.PROBING)
            fault = await self._probe(session, one, reference)
        except EngineRefused as error:
            fault = Fault(code=error.code, reason=f"the engine refused it: {error.message}")
        except EngineFailed as error:
            session.failures[one.engine_name] += 1
            if session.failures[one.engine_name] < MAX_FAILURES:
                raise  # an engine that is dying says the same of everything
            fault = Fault(code=error.code, reason=error.message)
        if fault is None:
            await self._mark(session, one.engine_name, ResidencyState.READY)
            log.info("adapter ready", replica=session.replica_id, adapter=one.engine_name)
            return
        log.warning("version quarantined", version=one.version.name, code=fault.code, reason=fault.reason)
        await self._condemn(one.version.id, fault)
        await self._mark(session, one.engine_name, ResidencyState.QUARANTINED, fault)
        if fault.code == "non_finite":
            # Its numbers may sit in cache blocks that others get next.
            raise Poisoned(f"{one.version.name} answered with numbers that are not finite")
        if one.engine_name in session.ledger.names:
            await session.admin.unload(one.engine_name)

    async def _put_off(self, session: Session, one: Wanted, error: Refused | Unavailable) -> None:
        """Look at the files again later, and bring what else is wanted meanwhile: the version itself is not at fault."""
        name = one.engine_name
        session.unread[name] += 1
        if isinstance(error, Unavailable) and session.unread[name] < MAX_FAILURES:
            raise error  # most often over by the next look, for which an engine that fills up can wait
        pause_s = min(LATEST_LOOK_S, FIRST_LOOK_S * 2.0 ** min(session.unread[name] - 1, 16))
        session.look_at[name] = time.monotonic() + pause_s
        log.warning("adapter put off", adapter=name, code=error.code, reason=error.message, pause_s=pause_s)
        if isinstance(error, Refused):
            await self._mark(session, name, ResidencyState.REFUSED, Fault(code=error.code, reason=error.message))

    def _check(self, one: Wanted, *, with_files: bool) -> Reference:
        version = one.version
        reference = read_reference(self._settings.references_dir / f"{version.digest}.json")
        if reference.digest != version.digest:
            raise Refused(
                f"the reference of {version.name} is of other weights ({reference.digest[:12]})", code="no_reference"
            )
        if with_files:
            self._registry.verify_files(version)
        return reference

    async def _load(self, session: Session, one: Wanted) -> None:
        session.ledger.add(one.engine_name)
        await self._mark(session, one.engine_name, ResidencyState.LOADING)
        await session.admin.load(one.engine_name, Path(one.directory))
        log.info("adapter loaded", replica=session.replica_id, adapter=one.engine_name)

    async def _probe(self, session: Session, one: Wanted, reference: Reference) -> Fault | None:
        try:
            return await session.prober.probe(one.engine_name, reference)
        except NotFinite as error:
            if error.model != one.engine_name:
                raise Poisoned(error.message) from error
            return Fault(code=error.code, reason=error.message)

    async def _condemn(self, version_id: str, fault: Fault) -> None:
        try:
            await self._registry.set_state(
                version_id, VersionState.QUARANTINED, code=fault.code, reason=fault.reason, actor=ACTOR
            )
        except Conflict as error:
            log.info("version was final already", version=version_id, reason=error.message)

    async def _refuse_for_room(self, session: Session, one: Wanted) -> None:
        reason = (
            f"the engine has loaded {len(session.ledger.names)} adapters since its start, and with engine.max_cpu_loras = "
            f"{self._settings.engine.max_cpu_loras} it keeps {self._capacity}, unloaded ones too: raise that and start the "
            "server again, or only start it again: what routes need is loaded first, then the newest"
        )
        await self._mark(
            session, one.engine_name, ResidencyState.REFUSED, Fault(code="capacity_exhausted", reason=reason)
        )
        log.warning("no room for an adapter", replica=session.replica_id, adapter=one.engine_name)

    async def _withdraw(self, session: Session, engine_name: str) -> None:
        table = tables.residency
        async with self._database.write() as connection:
            await _check_epoch(connection, session)
            mine = (table.c.replica_id == session.replica_id) & (table.c.engine_name == engine_name)
            await connection.execute(delete(table).where(mine))
            await bump_revision(connection)
        session.left_at[engine_name] = time.monotonic()

    async def _mark(
        self, session: Session, engine_name: str, state: ResidencyState, fault: Fault | None = None
    ) -> None:
        async with self._database.write() as connection:
            await _check_epoch(connection, session)
            await _put_row(connection, session.replica_id, engine_name, state, fault)
            await bump_revision(connection)


async def _rows(connection: AsyncConnection, replica_id: str) -> dict[str, Resident]:
    table = tables.residency
    found = await connection.execute(select(table).where(table.c.replica_id == replica_id))
    return {
        row["engine_name"]: Resident(
            engine_name=row["engine_name"], state=ResidencyState(row["state"]), code=row["code"], reason=row["reason"]
        )
        for row in found.mappings()
    }


async def _check_epoch(connection: AsyncConnection, session: Session) -> None:
    found = await connection.execute(select(tables.replicas.c.epoch).where(tables.replicas.c.id == session.replica_id))
    if found.scalar_one_or_none() != session.epoch:
        raise StaleEpoch(f"{session.replica_id} was started anew; what was seen of its last start is dropped")


async def _put_row(
    connection: AsyncConnection, replica_id: str, engine_name: str, state: ResidencyState, fault: Fault | None
) -> None:
    table = tables.residency
    mine = (table.c.replica_id == replica_id) & (table.c.engine_name == engine_name)
    await connection.execute(delete(table).where(mine))
    await connection.execute(
        insert(table).values(
            replica_id=replica_id,
            engine_name=engine_name,
            state=state,
            code=fault.code if fault else None,
            reason=fault.reason if fault else None,
            updated_at=now(),
        )
    )
