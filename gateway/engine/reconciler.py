"""Brings an engine to what it should hold, step by step: make room, verify, load, probe, tell the gateways."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import structlog

from ..database import Database, bump_revision
from ..errors import Conflict, Refused, Unavailable
from ..ids import now
from ..registry.models import AdapterVersion, ResidencyState, VersionState
from ..registry.reference import Reference
from ..registry.service import Registry
from ..settings import Settings
from .admin import EngineAdmin, EngineFailed, EngineRefused, NotFinite
from .evidence import Evidence, Suspicion
from .fleet import engine_slots
from .ledger import LoadLedger
from .models import Wanted
from .plan import (
    NO_ROOM,
    Load,
    Observed,
    Probe,
    Refuse,
    Unload,
    Withdraw,
    by_priority,
    is_restored,
    live_names,
    plan,
    touch_order,
)
from .probe import Fault, Prober, read_reference
from .residency_rows import (
    StaleEpoch,
    check_epoch,
    check_servable,
    drop_row,
    put_row,
    read_evaluated,
    read_rows,
    read_targets,
)

__all__ = ["Converger", "LoadLedger", "Poisoned", "Session", "StaleEpoch"]

log = structlog.get_logger(__name__)

ACTOR = "controller"
# Gateways look for a new table ten times a second; after this long none of them still sends traffic to what left it.
SETTLE_S = 1.0
# Gateways note every second what answers requests; what was noted within this time may be answering still.
IN_USE_S = 4.0
# A version that was named by its number so lately will be again.
PINNED_FOR_S = 600.0
# Looks at files that the disk did not let us read, before others are brought meanwhile.
MAX_UNREADABLE = 3
# How long files that are damaged, or that cannot be read, are left alone before they are hashed again: twice as long each time.
FIRST_LOOK_S = 1.0
LATEST_LOOK_S = 30.0


class Poisoned(Conflict):
    """The engine computes nonsense for everybody; only a restart cleans its cache."""

    code = "engine_poisoned"


@dataclass(slots=True)
class Session:
    """One start of one engine, and what is remembered of it."""

    replica_id: str
    epoch: str
    admin: EngineAdmin
    prober: Prober
    ledger: LoadLedger
    evidence: Evidence = field(default_factory=Evidence)
    has_passed_test: bool = False  # an adapter that is known to be good was loaded, and answered
    left_at: dict[str, float] = field(default_factory=dict)  # monotonic
    # Versions whose files are damaged or cannot be read: how often in a row, and when to look again (monotonic).
    unread: Counter[str] = field(default_factory=Counter)
    look_at: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Look:
    """What a look found: is there nothing left to do, and are the versions that routes need answerable?"""

    is_done: bool
    is_restored: bool


class Converger:
    """Brings one replica's adapters to what is wanted, one load at a time."""

    def __init__(self, database: Database, settings: Settings, registry: Registry) -> None:
        self._database = database
        self._settings = settings
        self._registry = registry

    @property
    def _capacity(self) -> int:
        return self._settings.engine.max_cpu_loras - 1  # a load takes its place before another one's is given up

    async def converge(self, session: Session) -> Look:
        """One look, all cheap steps, and the most needed probe or load."""
        desired, in_use = await self._desired()
        session.evidence.keep_only({one.engine_name for one in desired})
        seen = await self._observe(session, in_use)
        steps = plan(desired, seen)
        for step in steps:
            match step:
                case Withdraw():
                    await self._withdraw(session, step.engine_name)
                case Unload():
                    await self._database.check_fence()
                    await session.admin.unload(step.engine_name)
                    log.info("adapter unloaded", replica=session.replica_id, adapter=step.engine_name)
                case Refuse():
                    await self._refuse_for_room(session, step.wanted, desired)
                case Load() | Probe():
                    pass
        heavy = [step for step in steps if isinstance(step, Load | Probe)]
        if heavy:
            await self._step(session, heavy[0], desired, seen)
        return Look(is_done=not heavy, is_restored=is_restored(desired, seen))

    async def suspects(self, replica_id: str) -> tuple[list[str], bool]:
        """Engine names that were being loaded or probed, as the table has it; and whether any other was well there."""
        async with self._database.read() as connection:
            rows = await read_rows(connection, replica_id)
        found = [name for name, row in rows.items() if row.state in (ResidencyState.LOADING, ResidencyState.PROBING)]
        return found, any(row.state is ResidencyState.READY for row in rows.values())

    async def quarantine(self, engine_name: str, fault: Fault) -> bool:
        """Condemn the version of this engine name; False when it is some route's stable, which only its operator ends."""
        for version in await self._registry.versions(states={VersionState.VERIFIED}):
            if version.engine_name != engine_name:
                continue
            if await self._is_stable(version.name) and fault.code != "non_finite":
                log.error("stable version fails; it is tried again and again", version=version.name, **vars(fault))
                return False
            log.warning("version quarantined", version=version.name, code=fault.code, reason=fault.reason)
            await self._condemn(version.id, fault)
        return True

    async def _is_stable(self, name: str) -> bool:
        async with self._database.read() as connection:
            targets = await read_targets(connection)
        return any(name == route.stable for route in targets)

    async def _desired(self) -> tuple[list[Wanted], set[str]]:
        """Every version that may be loaded, most needed first, and the names of those in use."""
        versions = await self._registry.versions(states={VersionState.VERIFIED})
        if not versions:
            return [], set()
        async with self._database.read() as connection:
            targets = await read_targets(connection)
            evaluated = await read_evaluated(connection)
        live, pinned = set(live_names(targets)), {version.name for version in _used(versions, PINNED_FOR_S)}
        wanted = [
            Wanted(version=each, directory=str(self._registry.directory(each)), is_needed=each.name in live)
            for each in by_priority(versions, targets, evaluated, pinned)
        ]
        return wanted, {version.engine_name for version in _used(versions, IN_USE_S)}

    async def _observe(self, session: Session, in_use: set[str]) -> Observed:
        loaded = await session.admin.models()
        async with self._database.read() as connection:
            rows = await read_rows(connection, session.replica_id)
        clock = time.monotonic()
        for name in [name for name, at in session.left_at.items() if clock - at >= SETTLE_S]:
            del session.left_at[name]
        unreadable = {name for name, at in session.look_at.items() if clock < at}
        return Observed(
            loaded=loaded,
            rows=rows,
            capacity=self._capacity,
            leaving=set(session.left_at),
            in_use=in_use,
            put_off=unreadable | session.evidence.paused(clock),
            suspects=set(session.evidence.by_name),
        )

    async def _step(self, session: Session, step: Load | Probe, desired: Sequence[Wanted], seen: Observed) -> None:
        if isinstance(step, Load) and session.ledger.loads >= engine_slots(self._settings):
            failed = await self._touch(session, touch_order(desired, seen.loaded))
            by_name = {one.engine_name: one for one in desired}
            if failed is not None:  # a load now could cost a good one its place: see first what is the matter
                if failed in by_name:
                    await self._bring(session, Probe(by_name[failed]))
                return
        await self._bring(session, step)

    async def _touch(self, session: Session, names: Sequence[str]) -> str | None:
        """Ask each for a token, so that the engine evicts what was unloaded and none of these. The name that failed."""
        for name in names:
            try:
                await session.admin.generate(name, (0,), max_tokens=1)
            except (EngineFailed, EngineRefused, NotFinite) as error:
                log.warning("adapter does not answer", replica=session.replica_id, adapter=name, error=error.message)
                return name
        return None

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
            await self._suspect(session, one, fault)
            return
        except EngineFailed as error:
            await self._suspect(session, one, Fault(code=error.code, reason=error.message))
            return
        if fault is not None:
            await self._sentence(session, one, fault)
            return
        session.evidence.acquit(one.engine_name)
        await self._mark(session, one.engine_name, ResidencyState.READY)
        log.info("adapter ready", replica=session.replica_id, adapter=one.engine_name)

    async def _suspect(self, session: Session, one: Wanted, fault: Fault) -> None:
        """It failed once more. Evidence only while a neighbour is well: an engine in trouble says the same of everything."""
        found = _note(session, one, has_neighbour=await self._has_neighbour(session, one.engine_name))
        if found.is_proven:
            await self._sentence(session, one, fault)
            return
        await self._mark(session, one.engine_name, ResidencyState.WAITING, fault)
        log.warning("adapter failed; tried again", adapter=one.engine_name, attempts=found.attempts, **vars(fault))

    async def _has_neighbour(self, session: Session, name: str) -> bool:
        """Whether another adapter that gateways may use answers now; where there is none, whether the self-test's did."""
        async with self._database.read() as connection:
            rows = await read_rows(connection, session.replica_id)
        others = [row.engine_name for row in rows.values() if row.state is ResidencyState.READY]
        if name in others:
            others.remove(name)
        if others:
            return await self._touch(session, others[:1]) is None
        return session.has_passed_test

    async def _sentence(self, session: Session, one: Wanted, fault: Fault) -> None:
        """A fault that is proven: out with the version, unless a route has it as stable."""
        name = one.engine_name
        is_condemned = await self.quarantine(name, fault)
        if is_condemned:
            await self._mark(session, name, ResidencyState.QUARANTINED, fault)
        else:
            _note(session, one, has_neighbour=False)
            await self._mark(session, name, ResidencyState.WAITING, fault)
        if fault.code == "non_finite":
            # Its numbers may sit in cache blocks that others get next.
            raise Poisoned(f"{one.version.name} answered with numbers that are not finite")
        if name in session.ledger.names:
            await session.admin.unload(name)

    async def _put_off(self, session: Session, one: Wanted, error: Refused | Unavailable) -> None:
        """Look at the files again later, and bring what else is wanted meanwhile: the version itself is not at fault."""
        name = one.engine_name
        session.unread[name] += 1
        if isinstance(error, Unavailable) and session.unread[name] < MAX_UNREADABLE:
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
        # Before the row: who removes files looks at the ledger and then at versions.
        session.ledger.add(one.engine_name)
        async with self._database.write() as connection:
            await check_epoch(connection, session.replica_id, session.epoch)
            await check_servable(connection, one.version.id)
            await put_row(connection, session.replica_id, one.engine_name, ResidencyState.LOADING, None)
            await bump_revision(connection)
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

    async def _refuse_for_room(self, session: Session, one: Wanted, desired: Sequence[Wanted]) -> None:
        needed = sum(each.is_needed for each in desired)
        reason = (
            f"with engine.max_cpu_loras = {self._settings.engine.max_cpu_loras} the engine keeps {self._capacity} adapters, "
            f"and as many are needed more than this one ({needed} by routes). It is loaded when its rank rises: when a "
            "route names it, an evaluation asks it, or others are retired; or raise the setting and start the server again"
        )
        await self._mark(session, one.engine_name, ResidencyState.REFUSED, Fault(code=NO_ROOM, reason=reason))
        tell = log.error if one.is_needed else log.warning
        tell(
            "no room for an adapter",
            replica=session.replica_id,
            adapter=one.engine_name,
            needed_by_routes=one.is_needed,
        )

    async def _withdraw(self, session: Session, engine_name: str) -> None:
        async with self._database.write() as connection:
            await check_epoch(connection, session.replica_id, session.epoch)
            await drop_row(connection, session.replica_id, engine_name)
            await bump_revision(connection)
        session.left_at[engine_name] = time.monotonic()

    async def _mark(
        self, session: Session, engine_name: str, state: ResidencyState, fault: Fault | None = None
    ) -> None:
        async with self._database.write() as connection:
            await check_epoch(connection, session.replica_id, session.epoch)
            await put_row(connection, session.replica_id, engine_name, state, fault)
            await bump_revision(connection)


def _used(versions: Sequence[AdapterVersion], within_s: float) -> list[AdapterVersion]:
    since = now() - timedelta(seconds=within_s)
    return [version for version in versions if version.used_at is not None and version.used_at >= since]


def _note(session: Session, one: Wanted, *, has_neighbour: bool) -> Suspicion:
    return session.evidence.add(
        one.engine_name, "failure", is_alone=True, has_neighbour=has_neighbour, now=time.monotonic()
    )
