"""The real keeper of a replica over engines in this very process, disturbed by a seed and looked at all the time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from gateway.database import DEFAULT_PROJECT, Database
from gateway.engine.replicas import ReplicaKeeper
from gateway.errors import GatewayError
from gateway.keys import ANONYMOUS
from gateway.registry.models import VersionState
from gateway.registry.service import Registry
from gateway.rollouts.promotion import Promotions
from gateway.routing.store import create_route_for
from gateway.settings import BaseModelSettings, EngineSettings, Settings
from tests.corpus import WEIGHTS, make_adapter, make_base
from tests.fakes.answers import fake_reference
from tests.fakes.engine import Loaded
from tests.fakes.stack import a_living_controller, migrated
from tests.files import put_text

from . import residency_model
from .residency_model import FAULTS, LOOK_S, PROMPTS, Known, Watched

ADAPTERS = ("support", "billing")


class Simulation(Watched):
    """What happens to a replica and its versions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.promotions = Promotions(self.database)
        self.driving: asyncio.Task[None] | None = None

    # ---- The controller's part

    async def start_controller(self) -> None:
        """A keeper that knows nothing but what the database says."""
        self.keeper = ReplicaKeeper(self.database, self.settings, self.registry, self.fleet, self.spec)
        await self.keeper.start()
        self.driving = asyncio.create_task(self._drive(self.keeper))

    async def stop_controller(self) -> None:
        """As a kill does: nothing is written any more, the engine stays."""
        if self.driving is not None:
            self.driving.cancel()
            await asyncio.gather(self.driving, return_exceptions=True)
            self.driving = None
            await self.keeper.close()

    async def _drive(self, keeper: ReplicaKeeper) -> None:
        while True:
            try:
                await keeper.tick()
            except GatewayError as error:
                self.log.append(f"tick failed: {error.message}")
            await asyncio.sleep(LOOK_S)

    # ---- What happens

    async def run(self, steps: int) -> None:
        """That many disturbances, with calm every now and then, and at the end once more from an empty engine."""
        await self.publish_good()
        for _ in range(steps):
            await self.step()
        await self.calm()
        await self._crash()
        await self.calm()

    async def step(self) -> None:
        """One disturbance."""
        kinds = {"publish": 30, "verify": 5, "crash": 16, "controller": 10, "slow": 8, "hiccup": 8, "evict": 8}
        kinds |= {"promote": 10, "rollback": 4, "calm": 12}
        if not self.is_tight:
            kinds |= {"stranger": 4, "misplace": 4, "rot": 6, "mend": 4}
        kind = self.random.choices(list(kinds), list(kinds.values()))[0]
        self.done[kind] += 1
        await getattr(self, "calm" if kind == "calm" else f"_{kind}")()
        for _ in range(self.random.randint(0, 40)):  # somewhere in the middle of what follows
            await asyncio.sleep(0)
        await self.look()

    async def publish_good(self) -> str:
        """A good version, loaded; its name in engines."""
        known = await self._publish_one(None)
        await self._verify(known)
        await self.calm()
        return known.version.engine_name

    async def kill(self) -> None:
        """The engine dies of no version's fault."""
        await self.fleet.stop(self.spec.id, grace_s=0)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for it."""
        async with asyncio.timeout(residency_model.CALM_WITHIN_S):
            while not await self.quietly(condition):
                await asyncio.sleep(LOOK_S)

    async def _publish(self) -> None:
        is_good = self.is_tight or self.random.random() < 0.65
        known = await self._publish_one(None if is_good else self.random.choice([*FAULTS, "rot", "no_reference"]))
        if self.random.random() < 0.85:
            await self._verify(known)

    async def _publish_one(self, fault: str | None) -> Known:
        number = len(self.versions)
        folder = make_adapter(self.sources / str(number), self.registry.base, seed=self.seed * 1000 + number)
        version, is_new = await self.registry.publish(
            self.random.choice(ADAPTERS), folder, actor="key:test", project_id=DEFAULT_PROJECT
        )
        assert is_new
        weights = self.registry.directory(version) / WEIGHTS
        known = Known(version, sha256(weights.read_bytes()).hexdigest(), folder, is_verified=False, fault=fault)
        self.versions[version.engine_name] = known
        self.log.append(f"published {version.engine_name}, {fault or 'good'}")
        if fault == "rot":
            self._spoil(weights)
        if fault == "no_reference":
            known.fault, known.has_reference = None, False
        else:
            self._write_reference(known)
        return known

    def _write_reference(self, known: Known) -> None:
        reference = fake_reference(self.registry.directory(known.version))
        prompts = reference["prompts"][:PROMPTS]
        if known.fault == "parity":
            prompts = [prompt | {"adapter": [value - 9 for value in prompt["adapter"]]} for prompt in prompts]
        path = self.settings.references_dir / f"{known.version.digest}.json"
        put_text(path, json.dumps(reference | {"prompts": prompts, "digest": known.version.digest}))

    async def _verify(self, known: Known | None = None) -> None:
        waiting = [each for each in self.versions.values() if not each.is_verified]
        if known is None and not waiting:
            return
        known = known or self.random.choice(waiting)
        known.is_verified = True
        await self.registry.set_state(known.version.id, VersionState.VERIFIED, code=None, reason=None, actor="test")
        self.log.append(f"verified {known.version.engine_name}")

    async def _crash(self) -> None:
        """The engine dies of no version's fault. Never while something is on its way twice between two calms: that would
        look like a version's."""
        engine = self.fleet.engine
        if not self.crashes_left or engine is None or not self.fleet.is_running:
            return
        rows = await self.quietly(self.rows)
        self.before_crash = (engine.epoch, {name for name, state in rows.items() if state == "ready"})
        self.log.append(f"{engine.epoch} killed while {rows}")
        await self.kill()
        states = [*rows.values(), *(await self.quietly(self.rows)).values()]
        self.crashes_left = 0 if {"loading", "probing"} & {*states} else self.crashes_left - 1

    async def _controller(self) -> None:
        await self.stop_controller()
        self.log.append("controller restarted")
        await self.start_controller()

    async def _slow(self) -> None:
        if (name := self._any_good()) is not None:
            self.late[name] = self.random.choice(["never", "done"])
            self.log.append(f"the next load of {name} is late: {self.late[name]}")

    async def _hiccup(self) -> None:
        if (name := self._any_good()) is not None and name not in self.disturbed:
            self.disturbed.add(name)
            self.hiccups.add(name)
            self.log.append(f"one request of {name} will fail")

    async def _evict(self) -> None:
        if (name := await self._any_served()) is not None and self.fleet.engine is not None:
            self.disturbed.add(name)
            self.fleet.engine.adapters.pop(name)
            self.log.append(f"engine lost {name}")

    async def _misplace(self) -> None:
        """Another's weights under a version's name."""
        name, engine = await self._any_served(), self.fleet.engine
        if name is not None and engine is not None:
            self.disturbed.add(name)
            engine.adapters[name] = Loaded(Path("/elsewhere"), "another", is_poisoned=False)
            self.log.append(f"engine holds other weights as {name}")

    async def _stranger(self) -> None:
        if self.fleet.engine is not None:
            self.fleet.engine.load_named(f"stranger-{self.done['stranger']}")
            self.log.append("engine holds a stranger")

    async def _rot(self) -> None:
        """The disk loses a bit of a version that is loaded."""
        name = await self._any_served()
        others = [known for known in self.versions.values() if known.fault is None and known.is_verified]
        if name is not None and self.versions[name].fault is None and len(others) > 1:  # some neighbour stays well
            known = self.versions[name]
            known.fault = "rot"
            self._spoil(self.registry.directory(known.version) / WEIGHTS)
            self.log.append(f"file of {name} spoilt")

    async def _mend(self) -> None:
        """The very bundle is published again."""
        rotten = [known for known in self.versions.values() if known.fault == "rot"]
        if rotten:
            known = self.random.choice(rotten)
            await self.registry.publish(
                known.version.adapter, known.source, actor="key:test", project_id=DEFAULT_PROJECT
            )
            known.fault = None
            self.log.append(f"files of {known.version.engine_name} restored")

    async def _promote(self) -> None:
        name = self._any_good()
        if name is not None:
            version = self.versions[name].version
            await self._moved(
                self.promotions.promote(version.adapter, version.name, force=True, reason="x", principal=ANONYMOUS)
            )

    async def _rollback(self) -> None:
        await self._moved(self.promotions.rollback(self.random.choice(ADAPTERS), principal=ANONYMOUS))

    async def _moved(self, move: Any) -> None:
        try:
            self.log.append(f"{(await move).route.stable} is stable")
        except GatewayError as error:
            self.log.append(f"move refused: {error.code}")

    def _spoil(self, weights: Path) -> None:
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.chmod(0o644)
        weights.write_bytes(raw)

    def _any_good(self) -> str | None:
        good = [name for name, known in self.versions.items() if known.fault is None]
        return self.random.choice(good) if good else None

    async def _any_served(self) -> str | None:
        """A version that gateways believe to be in the engine; nobody but the controller touches one that is on its way."""
        rows = await self.quietly(self.rows)
        held = self.fleet.engine.adapters if self.fleet.engine and self.fleet.is_running else {}
        served = sorted(name for name in held if rows.get(name) == "ready" and name not in self.disturbed)
        return self.random.choice(served) if served else None


@asynccontextmanager
async def a_simulation(directory: Path, seed: int) -> AsyncIterator[Simulation]:
    """A home with a keeper that runs. Every third seed has an engine with little room."""
    base = make_base(directory / "base")
    room = 5 if seed % 3 == 0 else 64
    settings = Settings(
        home=directory / "home",
        base_model=BaseModelSettings(name=base.name, path=base.path),
        engine=EngineSettings(self_test=False, health_interval_s=0.02, hang_timeout_s=8, max_cpu_loras=room),
    )
    settings.prepare_directories()
    await migrated(settings)
    database = Database(settings.database)
    await a_living_controller(database)
    registry = Registry(database, settings, base, on_publish=(create_route_for,))
    simulation = Simulation(seed, settings, database, registry, directory / "sources")
    try:
        await simulation.start_controller()
        yield simulation
    finally:
        await simulation.stop_controller()
        await simulation.fleet.stop(simulation.spec.id, grace_s=0)
        simulation.reader.close()
        await database.close()
