"""Which adapters an engine should hold, and the steps that get it there: verify, load, probe, tell the gateways."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..database import Database, bump_revision, now
from ..errors import Conflict, Refused
from ..registry.models import AdapterVersion, ResidencyState, VersionState
from ..registry.service import Registry
from ..settings import Settings
from .admin import EngineAdmin, EngineRefused, NotFinite
from .models import Resident, Wanted
from .probe import Fault, Prober, Reference, read_reference

log = structlog.get_logger(__name__)

ACTOR = "controller"
# Gateways look for a new table ten times a second; after this long none of them still sends traffic to what left it.
SETTLE_S = 1.0
FINAL_JOB_STATES = ("succeeded", "failed", "cancelled")


class StaleEpoch(Conflict):
    """The engine was started anew meanwhile: what was seen of the old one is worth nothing."""

    code = "stale_epoch"


class Poisoned(Conflict):
    """The engine computes nonsense for everybody; only a restart cleans its cache."""

    code = "engine_poisoned"


# ---- Deciding -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RouteTargets:
    """What one route may send traffic to."""

    stable: str
    previous: str
    weighted: tuple[str, ...]
    candidate: str | None


def by_priority(
    versions: Sequence[AdapterVersion], routes: Sequence[RouteTargets], evaluated: Sequence[str]
) -> list[tuple[AdapterVersion, bool]]:
    """Verified versions, most needed first, and whether a route needs them.

    Routes' stable, then previous (a rollback waits for no load), shares of traffic, candidates; what evaluations wait for;
    what jobs made, newest first; the others, newest first.
    """
    routed = [route.stable for route in routes]
    routed += [route.previous for route in routes]
    routed += [target for route in routes for target in route.weighted]
    routed += [route.candidate for route in routes if route.candidate]
    newest = sorted(versions, key=lambda version: (version.created_at, version.id), reverse=True)
    names = dict.fromkeys(
        [*routed, *evaluated, *(v.name for v in newest if v.job_id is not None), *(v.name for v in newest)]
    )
    known = {version.name: version for version in versions if version.state is VersionState.VERIFIED}
    return [(known[name], name in set(routed)) for name in names if name in known]


@dataclass(frozen=True, slots=True)
class Observed:
    """One look at an engine and at what the gateways believe of it."""

    loaded: Mapping[str, str]  # name -> path, as the engine says
    rows: Mapping[str, Resident]
    ever_loaded: Collection[str]  # since the engine's start, whatever became of them: unloading frees no memory
    capacity: int
    leaving: Collection[str] = ()  # taken from the gateways' table a moment ago


@dataclass(frozen=True, slots=True)
class Load:
    """Verify the files, load, probe."""

    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Probe:
    """Loaded, not known to be right."""

    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Refuse:
    """There is no room for it."""

    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take it out of the gateways' table; the engine keeps it until they have noticed."""

    engine_name: str


@dataclass(frozen=True, slots=True)
class Unload:
    """No gateway sends traffic to it any more."""

    engine_name: str


Action = Load | Probe | Refuse | Withdraw | Unload


def plan(desired: Sequence[Wanted], observed: Observed) -> list[Action]:
    """All that is to do, cheap steps first, then loads and probes in order of need. Reads no clock."""
    wanted = {one.engine_name: one for one in desired}
    return [*_clear(wanted, observed), *_fill(desired, observed)]


def _is_right(one: Wanted | None, path: str | None) -> bool:
    return one is not None and path == one.directory


def _clear(wanted: Mapping[str, Wanted], observed: Observed) -> list[Action]:
    steps: list[Action] = []
    for name, path in observed.loaded.items():
        if _is_right(wanted.get(name), path):
            continue
        row = observed.rows.get(name)
        if row is not None and row.state is not ResidencyState.QUARANTINED:
            steps.append(Withdraw(name))
        elif name not in observed.leaving:
            steps.append(Unload(name))
    kept = {ResidencyState.QUARANTINED}
    for name, row in observed.rows.items():
        if name not in observed.loaded and name not in wanted and row.state not in kept:
            steps.append(Withdraw(name))
    return steps


def _fill(desired: Sequence[Wanted], observed: Observed) -> list[Action]:
    steps: list[Action] = []
    heavy: list[Action] = []
    used = set(observed.ever_loaded) | set(observed.loaded)
    for one in desired:
        row = observed.rows.get(one.engine_name)
        if _is_right(one, observed.loaded.get(one.engine_name)):
            if row is None or row.state is not ResidencyState.READY:
                heavy.append(Probe(one))
        elif one.engine_name in observed.loaded or (row is not None and row.state in _SETTLED):
            continue
        elif one.engine_name in used or len(used) < observed.capacity:
            used.add(one.engine_name)
            heavy.append(Load(one))
        else:
            steps.append(Refuse(one))
    return [*steps, *heavy]


# Room never grows and bad weights never heal within one start of an engine.
_SETTLED = (ResidencyState.REFUSED, ResidencyState.QUARANTINED)


# ---- Acting ---------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pass has come."""

    is_idle: bool
    is_restored: bool  # nothing is missing that a route needs


class Converger:
    """Brings one replica's adapters to what is wanted, one load at a time."""

    def __init__(self, database: Database, settings: Settings, registry: Registry) -> None:
        self._database = database
        self._settings = settings
        self._registry = registry

    async def converge(self, session: Session) -> Progress:
        """One look, all cheap steps, and the most needed load or probe."""
        desired = await self._desired()
        steps = plan(desired, await self._observe(session))
        for step in steps:
            match step:
                case Withdraw():
                    await self._withdraw(session, step.engine_name)
                case Unload():
                    await session.admin.unload(step.engine_name)
                    log.info("adapter unloaded", replica=session.replica_id, adapter=step.engine_name)
                case Refuse():
                    await self._refuse_for_room(session, step.wanted)
                case Load() | Probe():
                    pass
        heavy = [step for step in steps if isinstance(step, Load | Probe)]
        if heavy:
            await self._bring(session, heavy[0])
        return Progress(is_idle=not heavy, is_restored=not any(step.wanted.is_routed for step in heavy[1:]))

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
            Wanted(version=version, directory=str(self._registry.directory(version)), is_routed=is_routed)
            for version, is_routed in by_priority(versions, targets, evaluated)
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
            capacity=self._settings.engine.max_cpu_loras - 1,
            leaving=set(session.left_at),
        )

    async def _bring(self, session: Session, step: Load | Probe) -> None:
        one = step.wanted
        try:
            reference = await asyncio.to_thread(self._check, one)
            if isinstance(step, Load):
                await self._load(session, one)
            await self._mark(session, one.engine_name, ResidencyState.PROBING)
            fault = await self._probe(session, one, reference)
        except EngineRefused as error:
            fault = Fault(code=error.code, reason=f"the engine refused it: {error.message}")
        except Refused as error:
            if error.code == "no_reference":
                await self._mark(
                    session, one.engine_name, ResidencyState.REFUSED, Fault(code=error.code, reason=error.message)
                )
                return
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
        await session.admin.unload(one.engine_name)

    def _check(self, one: Wanted) -> Reference:
        version = one.version
        reference = read_reference(self._settings.references_dir / f"{version.digest}.json")
        if reference.digest != version.digest:
            raise Refused(
                f"the reference of {version.name} is of other weights ({reference.digest[:12]})", code="no_reference"
            )
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
        used, limit = len(session.ledger.names), self._settings.engine.max_cpu_loras
        reason = (
            f"the engine has loaded {used} adapters since its start and keeps at most {limit} in memory; raise "
            "engine.max_cpu_loras, or restart the engine to drop those that nobody needs"
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
