"""Controllers and fake engines over a real home: what the engine's tests need to build and to look at."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import select

from gateway import tables
from gateway.controller import stop_children
from gateway.database import DEFAULT_PROJECT, Database
from gateway.engine.fleet import LOCAL_REPLICA, engine_socket
from gateway.migrations.run import migrate
from gateway.processes import MARK_VARIABLE, home_marker
from gateway.registry.base_family import BaseFamily
from gateway.registry.models import AdapterVersion, VersionState
from gateway.registry.service import Registry
from gateway.routing.store import create_route_for
from gateway.settings import BaseModelSettings, EngineSettings, JobSettings, Settings
from gateway.supervisor import settings_environment
from tests.corpus import make_adapter, make_base
from tests.fakes.engine import fake_reference
from tests.files import put_text

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
FAST = {"health_interval_s": 0.05, "max_loras": 2, "hang_timeout_s": 2.0, "start_timeout_s": 30.0}


@dataclass
class EngineWorld:
    """One home, its registry, and the controllers that were started over it."""

    settings: Settings
    database: Database
    base: BaseFamily
    registry: Registry
    orders: Path
    controllers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def order(self, **orders: Any) -> None:
        """Tell the engine what to do wrongly."""
        put_text(self.orders, json.dumps(orders))

    def start_controller(self) -> subprocess.Popen[bytes]:
        """A controller of its own process."""
        with (self.settings.home / "controller.out").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gateway.controller", "--home", str(self.settings.home)],
                env=os.environ | settings_environment(self.settings),
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        self.controllers.append(process)
        return process

    def log(self) -> str:
        """What controllers and engine said."""
        parts = [self.settings.home / "controller.out", self.settings.logs_dir / f"{LOCAL_REPLICA}.log"]
        return "\n".join(path.read_text()[-4000:] for path in parts if path.exists())

    async def until(self, look: Callable[[], Awaitable[T | None]], what: str, timeout_s: float = 30) -> T:
        """Poll until `look` gives something true."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = await look()
            if found:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n{self.log()}")
            await asyncio.sleep(0.03)

    async def publish(self, seed: int, adapter: str = "support", *, verified: bool = True) -> AdapterVersion:
        """A new version, as `verify` leaves it."""
        folder = make_adapter(self.orders.parent / f"{adapter}-{seed}", self.base, seed=seed)
        version, _ = await self.registry.publish(adapter, folder, actor="key:test", project_id=DEFAULT_PROJECT)
        if not verified:
            return version
        reference = fake_reference(self.registry.directory(version))
        path = self.settings.references_dir / f"{version.digest}.json"
        put_text(path, json.dumps(reference | {"digest": version.digest}))
        return await self.registry.set_state(version.id, VersionState.VERIFIED, code=None, reason=None, actor="test")

    async def publish_again(self, seed: int, adapter: str = "support") -> AdapterVersion:
        """The very bundle of an earlier `publish`."""
        folder = self.orders.parent / f"{adapter}-{seed}"
        version, _ = await self.registry.publish(adapter, folder, actor="key:test", project_id=DEFAULT_PROJECT)
        return version

    async def replica(self) -> dict[str, Any]:
        rows = await self.rows(tables.replicas)
        return rows[0] if rows else {}

    async def rows(self, table: Any) -> list[dict[str, Any]]:
        async with self.database.read() as connection:
            return [dict(row) for row in (await connection.execute(select(table))).mappings()]

    async def residency(self) -> dict[str, dict[str, Any]]:
        """By the version's name in engines."""
        return {row["engine_name"]: row for row in await self.rows(tables.residency)}

    async def ready(self, *versions: AdapterVersion, not_epoch: str = "", timeout_s: float = 30) -> dict[str, Any]:
        """Until the engine takes traffic with these versions; its row."""

        async def look() -> dict[str, Any] | None:
            replica = await self.replica()
            if replica.get("state") != "ready" or replica["epoch"] == not_epoch:
                return None
            held = await self.residency()
            return replica if all(held.get(v.engine_name, {}).get("state") == "ready" for v in versions) else None

        return await self.until(look, f"engine ready with {[v.name for v in versions]}", timeout_s)

    async def settled(self, version: AdapterVersion, state: str) -> dict[str, Any]:
        """Until the version's residency is in this state; its row."""

        async def look() -> dict[str, Any] | None:
            row = (await self.residency()).get(version.engine_name)
            return row if row and row["state"] == state else None

        return await self.until(look, f"{version.name} is {state}")

    async def engine_pid(self) -> int:
        (row,) = [row for row in await self.rows(tables.processes) if row["kind"] == "engine"]
        return int(row["pid"])

    def children(self) -> list[int]:
        """Living processes that carry this home's mark."""
        mark = f"{MARK_VARIABLE}={home_marker(self.settings.home)}:".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0] if entry.name.isdigit() else "Z"
                if state != "Z" and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def socket(self) -> Path:
        return engine_socket(self.settings)


@asynccontextmanager
async def an_engine_world(tmp_path: Path, **engine: Any) -> AsyncIterator[EngineWorld]:
    """A home that nobody used before; every process of it is gone at the end."""
    base = make_base(tmp_path / "base")
    orders = tmp_path / "orders.json"
    command = (sys.executable, "-m", "tests.fakes.wilful_engine", "--orders", str(orders))
    settings = Settings(
        home=tmp_path / "home",
        auth="none",
        base_model=BaseModelSettings(name=base.name, path=base.path),
        engine=EngineSettings(**({"command": command} | FAST | engine)),
        jobs=JobSettings(threads=1),
    )
    settings.prepare_directories()
    await migrate(settings)
    database = Database(settings.database)
    registry = Registry(database, settings, base, on_publish=(create_route_for,))
    world = EngineWorld(settings, database, base, registry, orders)
    try:
        yield world
    finally:
        for process in world.controllers:
            if process.poll() is None:
                process.kill()
            process.wait()
        for pid in world.children():
            os.kill(pid, signal.SIGCONT)
        await stop_children(settings, grace_s=0.2)
        await database.close()
