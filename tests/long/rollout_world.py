"""The real promotion code over a real SQLite file, moved about by a seed and compared with the model after every step."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import delete, insert, update

from gateway import tables
from gateway.database import DEFAULT_PROJECT, Database, bump_revision
from gateway.errors import GatewayError
from gateway.ids import now
from gateway.jobs.suites import Suites
from gateway.keys import Principal
from gateway.rollouts.models import Moved, RouteMoved
from gateway.rollouts.promotion import Promotions
from gateway.routing.models import Variant
from gateway.routing.store import create_route_for
from gateway.settings import Settings
from tests.factories import a_version
from tests.fakes.stack import migrated

from .rollout_checks import ACTORS, Checked, Disagreement
from .rollout_model import (
    BASE,
    BASE_DIGEST,
    Move,
    Promote,
    Rollback,
    Route,
    SetCandidate,
    SetGates,
    SetVariants,
    Version,
    World,
)

ROUTES = ("support", "billing")
REPLICAS = ("replica-1", "replica-2")
SUITES = ("target", "forgetting")
MAX_VERSIONS = 7
_EPOCH = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(kw_only=True)
class Simulation(Checked):
    """One seed: the state, the two movers over connections of their own, and the model."""

    seed: int
    movers: list[Promotions]
    log: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.random = random.Random(self.seed)
        self.moments = count()
        self.last_move: Move | None = None

    async def begin(self) -> None:
        """Two suites, two engines and a version of each adapter."""
        for suite in SUITES:
            self._change_suite(suite)
        for replica in REPLICAS:
            self.model.ready[replica] = True
            values = {"id": replica, "state": "ready", "socket": "/s", "epoch": "1", "self_test": "passed"}
            await self._write(insert(tables.replicas).values(**values, revision=1))
        until = datetime.now(UTC) + timedelta(days=1)
        await self._write(insert(tables.leases).values(name="controller", holder="test", epoch=1, expires_at=until))
        for route in ROUTES:
            await self._publish(route)

    async def run(self, steps: int) -> None:
        """That many steps, each one checked."""
        for _ in range(steps):
            await self.step()

    async def step(self) -> None:
        """One thing that happens."""
        kinds = {"move": 52, "race": 12, "repeat": 5, "publish": 4, "judge": 9, "residency": 8, "replica": 5}
        kinds |= {"state": 4, "suite": 1, "gated": 8, "trial": 6, "strand": 4}
        kind = self.random.choices(list(kinds), list(kinds.values()))[0]
        self.done[kind] += 1
        try:
            await getattr(self, f"_{kind}")()
            self.check()
        except Disagreement as error:
            raise Disagreement(f"seed {self.seed}: {error}\nlast steps:\n" + "\n".join(self.log[-12:])) from None

    # ---- What moves traffic

    async def _move(self) -> None:
        await self._moved(self._any_move())

    async def _gated(self) -> None:
        """A version that passes every gate there is, and then its promotion: what else speaks against it must still do so."""
        route = self.model.routes[self.random.choice(ROUTES)]
        if not route.gates:
            await self._moved(SetGates(route.name, suites=(self.random.choice(SUITES),)))
        name, version = self.random.choice(list(route.versions.items()))
        against = BASE_DIGEST if route.stable == BASE else route.versions[route.stable].digest
        for suite in route.gates:
            await self._add_verdict(version.digest, suite, self.model.suites[suite], against, "passed")
        await self._moved(Promote(route.name, target=name))

    async def _trial(self) -> None:
        """A share for a version by force, and often the rollback of whatever is so tried."""
        route = self.model.routes[self.random.choice(ROUTES)]
        await self._moved(SetVariants(route.name, None, "because", self._any_split(route), force=True))
        if self.random.random() < 0.5:
            await self._moved(Rollback(route.name, accept_load=True))

    async def _strand(self) -> None:
        """Two promotions by force, and a rollback to what no engine holds any more."""
        route = self.model.routes[self.random.choice(ROUTES)]
        fit = [name for name, each in route.versions.items() if each.state == "verified" and self.model.is_held(name)]
        for name in self.random.sample(fit, min(2, len(fit))):
            if name != route.stable:
                await self._moved(Promote(route.name, None, "because", name, force=True))
        back = Rollback(route.name, further=True)
        if route.goes_to(back) == BASE:
            return
        await self._set_residency(self.random.choice(REPLICAS), route.goes_to(back), "gone")
        await self._moved(back)

    async def _moved(self, move: Move) -> None:
        code, moved = await perform(self.movers[0], move, ACTORS[0])
        self.log.append(f"{move} -> {code or 'done'}")
        refusals = self.model.refusals(move)
        if self.model.is_repeat(move):
            self._check_repeat(move, code, moved)
            return
        self.done["refused" if code else move.action] += 1
        self.done["unforced promotions"] += isinstance(move, Promote) and code is None and not move.force
        if not _fits(refusals, code):
            raise Disagreement(f"{move} came to {code or 'done'}; the model says {sorted(refusals) or 'done'}")
        if code is None:
            route = self.model.routes[move.route]
            self.done["trials withdrawn"] += isinstance(move, Rollback) and route.only_withdraws(move)
            left = self.model.apply(move)
            self.last_move = replace(move, expected=self.model.routes[move.route].revision - 1)
            self.check_answer(move, moved, left)

    async def _repeat(self) -> None:
        """The same call a second time, as a client does that lost the answer: a move is answered as it was, and made once."""
        if self.last_move is None:
            return
        code, moved = await perform(self.movers[1], self.last_move, ACTORS[1])
        self.log.append(f"again {self.last_move} -> {code or 'done'}")
        if isinstance(self.last_move, SetCandidate | SetGates):
            if code != "route_moved":
                raise Disagreement(f"{self.last_move} was done twice")
            return
        self._check_repeat(self.last_move, code, moved)

    def _check_repeat(self, move: Move, code: str | None, moved: Moved | RouteMoved | None) -> None:
        self.done["repeats"] += 1
        if not _fits(self.model.refusals(move), code):
            raise Disagreement(f"the repeat of {move} came to {code or 'done'}")
        if code is None and (moved is None or not moved.repeated or moved.before.revision != move.expected):
            raise Disagreement(f"{move} was answered as a new one: {moved}")

    async def _race(self) -> None:
        """Two movers at once, mostly with the same revision in mind: as if one had come after the other."""
        first = self._any_move()
        second = replace(self._any_move(), route=first.route)
        if self.random.random() < 0.7:
            seen = self.model.routes[first.route].revision
            first, second = replace(first, expected=seen), replace(second, expected=seen)
        moves = (first, second)
        asked = [perform(mover, move, actor) for mover, move, actor in zip(self.movers, moves, ACTORS, strict=True)]
        answers = await asyncio.gather(*asked)
        codes = ["repeated" if moved is not None and moved.repeated else code for code, moved in answers]
        self.log.append(f"at once {moves} -> {codes}")
        self.done["both moved" if codes == [None, None] else "one moved" if None in codes else "none moved"] += 1
        if first.expected is not None and codes == [None, None] and first.expected == second.expected:
            raise Disagreement(f"both of {moves} were done on one revision")
        after = [world for world in (self._in_order(moves, codes, order) for order in ((0, 1), (1, 0))) if world]
        if not after:
            raise Disagreement(f"{moves} came to {codes}, which no order of the two explains")
        self.model = next((world for world in after if self.matches(world)), after[0])

    def _in_order(self, moves: tuple[Move, Move], codes: list[str | None], order: tuple[int, int]) -> World | None:
        world = self.model.copy()
        has_moved = False
        for place in order:
            move, code = moves[place], codes[place]
            if code == "repeated":
                # Of a revision that is gone; one that names none had looked before the other, the same, moved.
                if world.is_repeat(move) or (has_moved and _asked(moves[0]) == _asked(moves[1])):
                    continue
                return None
            refusals = world.refusals(move)
            if has_moved and code == "route_moved" and not isinstance(move, SetCandidate | SetGates):
                continue  # it had looked before the other moved
            if not _fits(refusals, code):
                return None
            if code is None:
                world.apply(move)
                has_moved = True
        return world

    def _any_move(self) -> Move:
        route = self.model.routes[self.random.choice(ROUTES)]
        expected = self.random.choices([None, route.revision, route.revision - 1], [60, 32, 8])[0]
        reason = self.random.choices([None, "because", "  "], [15, 75, 10])[0]
        kinds = [Promote, Rollback, SetVariants, SetCandidate, SetGates]
        match self.random.choices(kinds, [44, 24, 16, 10, 6])[0].__name__:
            case "Promote":
                target = None if self.random.random() < 0.2 else self._any_target(route)
                is_forced = self.random.random() < 0.4
                return Promote(route.name, expected, _stripped(reason), target, is_forced)
            case "Rollback":
                to = self._any_target(route) if self.random.random() < 0.35 else None
                force, further, accept = (self.random.random() < chance for chance in (0.3, 0.5, 0.5))
                return Rollback(route.name, expected, _stripped(reason), to, force, further, accept)
            case "SetVariants":
                is_forced = self.random.random() < 0.5
                wanted = self._any_split(route)
                tries = self.random.choices([None, (), (wanted[0][0],), (route.stable,)], [60, 12, 24, 4])[0]
                return SetVariants(route.name, expected, _stripped(reason), wanted, is_forced, tries)
            case "SetCandidate":
                target = None if self.random.random() < 0.2 else self._any_target(route)
                return SetCandidate(route.name, expected, _stripped(reason), target)
            case _:
                names = (*SUITES, "nothing") if self.random.random() < 0.1 else SUITES
                chosen = tuple(self.random.choices(names, k=self.random.randint(0, 2)))
                return SetGates(route.name, expected, _stripped(reason), chosen)

    def _any_target(self, route: Route) -> str:
        if self.random.random() < 0.08:
            return self.random.choice([BASE, f"{route.name}@99", "billing@1", "support@1"])
        fit = [
            name for name, version in route.versions.items() if version.state == "verified" and not version.is_marked
        ]
        return self.random.choice(fit if fit and self.random.random() < 0.7 else list(route.versions))

    def _any_split(self, route: Route) -> tuple[tuple[str, int], ...]:
        share = self.random.choice([0, 5, 20, 50, 100])
        target = self._any_target(route)
        other = route.stable if self.random.random() < 0.7 and target != route.stable else self._any_target(route)
        return ((target, share), (self.random.choice([other, other, other, BASE]), 100 - share))

    # ---- What else happens

    async def _publish(self, name: str | None = None) -> None:
        name = name or self.random.choice(ROUTES)
        route = self.model.routes.setdefault(name, Route(name))
        if len(route.versions) >= MAX_VERSIONS:
            return
        number = len(route.versions) + 1
        digest = sha256(f"{self.seed} {name} {number}".encode()).hexdigest()
        state = self.random.choice(["received", "verified", "verified", "verified"])
        made = a_version(adapter=name, version=number, digest=digest, state=state, base_digest=BASE_DIGEST)
        async with self.databases[0].write() as connection:
            await connection.execute(insert(tables.adapter_versions).values(**made.model_dump()))
            await create_route_for(connection, made)
            await bump_revision(connection)
        route.versions[made.name] = Version(number, digest, state)
        self.log.append(f"published {made.name}, {state}")
        if self.random.random() < 0.8:
            for replica in REPLICAS:
                await self._set_residency(replica, made.name, "ready")

    async def _state(self) -> None:
        """Verified, rejected, or quarantined, as controllers do."""
        route = self.model.routes[self.random.choice(ROUTES)]
        name, version = self.random.choice(list(route.versions.items()))
        moves = {"received": ["verified", "verified", "rejected"], "verified": ["quarantined"] + ["verified"] * 9}
        to = self.random.choice(moves.get(version.state, [version.state]))
        table = tables.adapter_versions
        await self._write(update(table).where(table.c.digest == version.digest).values(state=to))
        version.state = to
        self.log.append(f"{name} is {to}")

    async def _judge(self) -> None:
        """A new verdict, most often one that counts now."""
        route = self.model.routes[self.random.choice(ROUTES)]
        version = self.random.choice(
            [v for v in route.versions.values() if not v.is_marked] or [*route.versions.values()]
        )
        against = BASE_DIGEST if route.stable == BASE else route.versions[route.stable].digest
        for suite in SUITES if self.random.random() < 0.6 else [self.random.choice(SUITES)]:
            verdict = self.random.choices(["passed", "failed", "inconclusive", "error"], [80, 10, 6, 4])[0]
            baseline = against if self.random.random() < 0.9 else sha256(b"older").hexdigest()
            suite_digest = self.model.suites[suite] if self.random.random() < 0.9 else "e" * 64
            await self._add_verdict(version.digest, suite, suite_digest, baseline, verdict)

    async def _add_verdict(self, digest: str, suite: str, suite_digest: str, baseline: str, verdict: str) -> None:
        number = next(self.moments)
        row = {
            "id": f"verdict-{number}", "project_id": DEFAULT_PROJECT, "created_at": _EPOCH + timedelta(seconds=number),
            "created_by": "test", "digest": digest, "suite": suite, "suite_digest": suite_digest, "baseline": baseline,
            "fingerprint": f"{number:064d}", "verdict": verdict, "reason": "", "job_id": "j", "looks": 1,
        }  # fmt: skip
        await self._write(insert(tables.verdicts).values(**row))
        self.model.verdicts[digest, suite, suite_digest, baseline] = verdict
        self.log.append(f"{verdict} on {suite} for {digest[:6]} against {baseline[:6]}")

    async def _residency(self) -> None:
        route = self.model.routes[self.random.choice(ROUTES)]
        state = self.random.choices(["ready", "loading", "probing", "quarantined", "gone"], [84, 4, 4, 2, 6])[0]
        await self._set_residency(self.random.choice(REPLICAS), self.random.choice(list(route.versions)), state)

    async def _set_residency(self, replica: str, name: str, state: str) -> None:
        adapter, _, number = name.partition("@")
        engine_name = f"{adapter}.v{number}.{self.model.routes[adapter].versions[name].digest[:12]}"
        table = tables.residency
        mine = (table.c.replica_id == replica) & (table.c.engine_name == engine_name)
        await self._write(delete(table).where(mine))
        self.model.held.discard((replica, name))
        if state != "gone":
            row = {"replica_id": replica, "engine_name": engine_name, "state": state, "updated_at": now()}
            await self._write(insert(table).values(**row))
        if state == "ready":
            self.model.held.add((replica, name))
        self.log.append(f"{name} on {replica}: {state}")

    async def _replica(self) -> None:
        replica = self.random.choice(REPLICAS)
        state = self.random.choices(["ready", "failed", "starting", "testing", "stopped"], [84, 4, 4, 4, 4])[0]
        table = tables.replicas
        await self._write(update(table).where(table.c.id == replica).values(state=state))
        self.model.ready[replica] = state == "ready"
        self.log.append(f"{replica} is {state}")

    async def _suite(self) -> None:
        self._change_suite(self.random.choice(SUITES))

    def _change_suite(self, name: str) -> None:
        """Other bytes, so another digest: what was passed before counts no more."""
        folder = self.settings.suites_dir / name
        folder.mkdir(exist_ok=True)
        (folder / "suite.yaml").write_text(f"name: {name}\nedition: {next(self.moments) * 997}\n")
        content = sha256((folder / "suite.yaml").read_bytes()).hexdigest()
        self.model.suites[name] = sha256(f"suite.yaml\x00{content}\n".encode()).hexdigest()

    async def _write(self, statement: Any) -> None:
        async with self.databases[0].write() as connection:
            await connection.execute(statement)
            await bump_revision(connection)


def _asked(move: Move) -> tuple[object, ...] | None:
    return None if isinstance(move, SetCandidate | SetGates) else move.asked


def _fits(refusals: set[str], code: str | None) -> bool:
    return not refusals if code is None else code in refusals


def _stripped(reason: str | None) -> str | None:
    return (reason or "").strip() or None


async def perform(mover: Promotions, move: Move, actor: str) -> tuple[str | None, Moved | RouteMoved | None]:
    """Ask the real code; the code of its refusal, or None and its answer."""
    principal = Principal(f"key-{actor}", actor, DEFAULT_PROJECT, frozenset({"admin"}))
    common: dict[str, Any] = {"expected_revision": move.expected, "reason": move.reason, "principal": principal}
    try:
        match move:
            case Promote():
                return None, await mover.promote(move.route, move.target, force=move.force, **common)
            case Rollback():
                consents: dict[str, Any] = {
                    "force": move.force,
                    "further": move.further,
                    "accept_load": move.accept_load,
                }
                return None, await mover.rollback(move.route, to=move.to, **consents, **common)
            case SetVariants():
                wanted = [Variant(target=target, weight=weight) for target, weight in move.variants]
                return None, await mover.set_variants(move.route, wanted, tries=move.tries, force=move.force, **common)
            case SetCandidate():
                await mover.set_candidate(move.route, move.target, **common)
            case SetGates():
                await mover.set_gates(move.route, move.suites, **common)
    except GatewayError as error:
        return error.code, None
    return None, None


@asynccontextmanager
async def a_simulation(home: Path, seed: int) -> AsyncIterator[Simulation]:
    """A state that nobody used before; its schema is migrated once and copied afterwards."""
    settings = Settings(home=home)
    settings.prepare_directories()
    await migrated(settings)
    databases = [Database(settings.database) for _ in ACTORS]
    suites = Suites(settings, shipped=home / "shipped")
    simulation = Simulation(
        settings, databases, seed=seed, movers=[Promotions(each, suites=suites) for each in databases]
    )
    try:
        await simulation.begin()
        yield simulation
    finally:
        simulation.reader.close()
        for database in databases:
            await database.close()
