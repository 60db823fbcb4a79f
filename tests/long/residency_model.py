"""What must hold of an engine and of what gateways are told about it: at every load, at every moment, and once it is calm."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from gateway.database import Database, sqlite_file
from gateway.engine.fleet import engine_slots, engine_spec
from gateway.registry.models import AdapterVersion
from gateway.registry.service import Registry
from gateway.settings import Settings
from tests.corpus import WEIGHTS

from .residency_engine import Engine, InProcessFleet

T = TypeVar("T")
PROMPTS = 3
# How a version can be bad, and the code that it must be quarantined with. Rot is no fault of its own, and heals.
FAULTS = {
    "refuse": "engine_refused",
    "silent": "no_effect",
    "nan": "non_finite",
    "fail": "engine_failed",
    "die": "engine_died",
    "parity": "parity",
}
CALM_WITHIN_S = 20.0
LOOK_S = 0.005


class Disagreement(AssertionError):
    """Something is so that must never be."""


@dataclass
class Known:
    """What the model knows of a version."""

    version: AdapterVersion
    weights: str  # sha256 of the file as it was published
    source: Path
    is_verified: bool = True
    fault: str | None = None
    has_reference: bool = True


@dataclass
class Watched:
    """One seed: a home, the engines of its one replica, and what the model knows of its versions."""

    seed: int
    settings: Settings
    database: Database
    registry: Registry
    sources: Path
    versions: dict[str, Known] = field(default_factory=dict)  # by the name in engines
    late: dict[str, str] = field(default_factory=dict)
    hiccups: set[str] = field(default_factory=set)
    disturbed: set[str] = field(default_factory=set)
    paths: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.spec = engine_spec(self.settings)
        self.fleet = InProcessFleet(
            self, replica_id=self.spec.id, model=self.settings.base_model.name, slots=engine_slots(self.settings)
        )
        self.capacity = self.settings.engine.max_cpu_loras - 1
        self.is_tight = self.capacity < 10
        self.crashes_left = 0
        self.before_crash: tuple[str, set[str]] | None = None
        file = sqlite_file(self.settings.database)
        assert file is not None
        self.reader = sqlite3.connect(file, isolation_level=None, timeout=0)
        self.reader.row_factory = sqlite3.Row

    def _told(self, said: list[str]) -> str:
        return f"seed {self.seed}: {'; '.join(said)}\nlast steps:\n" + "\n".join(self.log[-15:])

    def fault_of(self, name: str) -> str | None:
        """How a version misbehaves in engines."""
        known = self.versions.get(name)
        return known.fault if known else None

    def rows(self) -> dict[str, str]:
        """What gateways are told: state by name."""
        return {row["engine_name"]: row["state"] for row in self.reader.execute("SELECT * FROM residency")}

    def replica(self) -> tuple[str, str]:
        """(state, epoch) of the replica's row."""
        row = self.reader.execute("SELECT state, epoch FROM replicas").fetchone()
        return (row["state"], row["epoch"]) if row else ("", "")

    def version_row(self, known: Known) -> sqlite3.Row:
        """The version as it is stored now."""
        query = "SELECT state, state_code FROM adapter_versions WHERE id = ?"
        row: sqlite3.Row = self.reader.execute(query, (known.version.id,)).fetchone()
        return row

    async def note_load(self, body: dict[str, Any]) -> None:
        """Everything that must hold of a load, in the moment in which the engine is asked for it."""
        name, path = body["lora_name"], body["lora_path"]
        self.done["loads"] += 1
        if set(body) != {"lora_name", "lora_path"}:
            self.wrong.append(f"a load says more than name and path: {body}")
        if self.paths.setdefault(name, path) != path:
            self.wrong.append(f"{name} was {self.paths[name]} and is loaded from {path}")
        known = self.versions.get(name)
        if known is None:
            self.wrong.append(f"{name} was never published")
            return
        if (state := (await self.quietly(lambda: self.version_row(known)))["state"]) != "verified":
            self.wrong.append(f"{name} is {state} and is loaded")
        if sha256((Path(path) / WEIGHTS).read_bytes()).hexdigest() != known.weights:
            self.wrong.append(f"{name} is loaded from bytes that were not published")

    async def quietly(self, look: Callable[[], T]) -> T:
        """Look between two writes: to wait for a lock here would keep its holder, in this same loop, from going on."""
        while True:
            try:
                return look()
            except sqlite3.OperationalError:
                await asyncio.sleep(0.001)

    async def look(self) -> None:
        """Everything that must hold at any moment."""
        await self.quietly(self._look)

    def _look(self) -> None:
        state, epoch = self.replica()
        engine = self.fleet.engine
        if engine is not None and self.fleet.is_running and engine.epoch == epoch:
            self._look_at_rows(engine)
            if state == "ready" and self.before_crash is not None and self.before_crash[0] != epoch:
                self._look_at_restored(self.before_crash[1])
                self.before_crash = None
            if forgotten := engine.forgotten():
                self.wrong.append(f"the engine forgot {sorted(forgotten)}, which may be asked for")
            if engine.reread:
                self.wrong.append(f"the engine read {engine.reread} again in the middle of a step")
        if self.wrong:
            raise Disagreement(self._told(self.wrong))

    def _look_at_rows(self, engine: Engine) -> None:
        for name, state in self.rows().items():
            if state != "ready" or name in self.disturbed:
                continue
            if name not in engine.adapters:
                self.wrong.append(f"{name} is READY and not in the engine")
            elif engine.probed[name] < PROMPTS:
                self.wrong.append(f"{name} is READY after {engine.probed[name]} probes")

    def _look_at_restored(self, names: set[str]) -> None:
        rows, routed = self.rows(), set(self._routed())
        for name in names - self.disturbed:
            known = self.versions[name]
            if known.version.name not in routed:
                continue  # it may come later
            if known.fault == "rot":
                continue  # its files are no longer what was published
            if rows.get(name) != "ready" and self.version_row(known)["state"] == "verified":
                self.wrong.append(f"the engine takes traffic again and {name} is {rows.get(name)}")

    def _routed(self) -> list[str]:
        """What routes need, most needed first."""
        rows = self.reader.execute("SELECT stable, previous FROM routes ORDER BY name").fetchall()
        return list(dict.fromkeys(row[pointer] for pointer in ("stable", "previous") for row in rows))

    # ---- Once it is calm

    async def calm(self) -> None:
        """Wait until there is nothing left to do; then engine and table must be as the model says."""
        deadline = time.monotonic() + CALM_WITHIN_S
        while differences := await self.quietly(self._differences):
            await self.look()
            if time.monotonic() > deadline:
                raise Disagreement(self._told(differences))
            await asyncio.sleep(LOOK_S)
        await self.look()
        self.crashes_left = 2
        self.disturbed.clear()
        self.log.append("calm")

    def _differences(self) -> list[str]:
        engine, (state, epoch) = self.fleet.engine, self.replica()
        if engine is None or not self.fleet.is_running or (state, epoch) != ("ready", engine.epoch):
            return [f"the replica is {state} {epoch}"]
        rows = self.rows()
        found = [f"{name} is in the engine" for name in engine.adapters if name not in self.versions]
        for name, known in self.versions.items():
            if problem := self._problem(engine, name, known, rows.get(name)):
                found.append(f"{name}: {problem}")
        return found

    def _problem(self, engine: Engine, name: str, known: Known, row: str | None) -> str | None:
        stored = self.version_row(known)
        held = engine.adapters.get(name)
        if held is not None and held.path != self.registry.directory(known.version):
            return f"holds other weights: {held.path}"
        is_in = held is not None and row == "ready"
        is_out = held is None and row != "ready"
        if not known.is_verified:
            return None if is_out and row is None else f"is not verified, and {row}"
        if not known.has_reference:
            return None if is_out and row == "refused" else f"has no reference, and is {row}"
        if known.fault in FAULTS:
            is_condemned = is_out and (stored["state"], stored["state_code"]) == ("quarantined", FAULTS[known.fault])
            return None if is_condemned else f"{known.fault}, and {row}, {stored['state']}"
        if stored["state"] != "verified":
            return f"is good, and {stored['state']} for {stored['state_code']}"
        if known.fault == "rot":
            # Spoilt on the disk, what is loaded goes on; it may not come in again until it is published again.
            return None if is_in or (is_out and row == "refused") else f"is spoilt, and {row}"
        if is_in or (row == "refused" and is_out and name not in self._needed_most()):
            return None
        return f"is good, and {row}"

    def _needed_most(self) -> set[str]:
        """What routes name, then the newest, as many as there is room for."""
        known = [each for each in self.versions.values() if each.is_verified and not self._is_condemned(each)]
        known.sort(key=lambda each: (each.version.created_at, each.version.id), reverse=True)
        order = {name: place for place, name in enumerate(self._routed())}
        known.sort(key=lambda each: order.get(each.version.name, len(order)))
        return {each.version.engine_name for each in known[: self.capacity]}

    def _is_condemned(self, known: Known) -> bool:
        return bool(self.version_row(known)["state"] == "quarantined")
