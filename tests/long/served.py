"""A whole server of its own processes over the fake engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from gateway.processes import MARK_VARIABLE, home_marker
from gateway.registry.base_family import BaseFamily
from gateway.settings import BaseModelSettings, EngineSettings, JobSettings, Settings
from gateway.supervisor import settings_environment
from tests.corpus import make_base

ROOT = Path(__file__).parents[2]
PARTS = {"gateway": "tests.long.parts.gateway", "controller": "tests.long.parts.controller"}
BROKEN = (aiohttp.ClientError, TimeoutError, OSError)
LOOK_S = 0.05


class Broken(AssertionError):
    """Something is so that must never be."""


@dataclass
class Served:
    """One home and the supervisor over it."""

    settings: Settings
    base: BaseFamily
    process: subprocess.Popen[bytes]
    http: aiohttp.ClientSession

    @property
    def output(self) -> Path:
        return self.settings.home / "serve.out"

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """What the database says."""
        with closing(sqlite3.connect(self.settings.home / "turnout.db", timeout=20)) as connection:
            connection.row_factory = sqlite3.Row
            return connection.execute(query, values).fetchall()

    def part(self, name: str) -> int | None:
        """The pid of the gateway, the controller, or the engine."""
        if name == "engine":
            engines = self.marked(":engine-0:")
            return engines[0] if engines else None
        for process in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):
                if PARTS[name] in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    return process.pid
        return None

    def marked(self, what: str = ":") -> list[int]:
        """Living children of any controller of this home, by what their mark says."""
        mark = f"{MARK_VARIABLE}={home_marker(self.settings.home)}{what}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0] if entry.name.isdigit() else "Z"
                if state != "Z" and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def leftovers(self) -> list[str]:
        """What runs of this home besides the supervisor."""
        found = [str(pid) for pid in self.marked()]
        for process in psutil.process_iter(["cmdline"]):
            argv = process.info["cmdline"] or []
            if str(self.settings.home) in argv and process.pid != self.process.pid:
                found.append(" ".join(argv))
        return found

    def told(self) -> dict[str, int]:
        """What the gateway says of itself."""
        found: dict[str, int] = json.loads((self.settings.home / "gateway.json").read_text())
        return found

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.http.get(f"{self.settings.url}{path}") as answer:
            return answer.status, await answer.json()

    async def post(self, path: str, **body: Any) -> tuple[int, Any]:
        async with self.http.post(f"{self.settings.url}{path}", json=body) as answer:
            return answer.status, await answer.json()

    async def until(self, look: Callable[[], Awaitable[object]], what: str, timeout_s: float = 60) -> float:
        """Wait until `look` gives something true; how long it took."""
        started = time.monotonic()
        while True:
            with suppress(*BROKEN):
                if await look():
                    return time.monotonic() - started
            if time.monotonic() - started > timeout_s:
                raise Broken(f"{what}: not within {timeout_s:.0f} s\n{self.log()}")
            await asyncio.sleep(LOOK_S)

    def log(self) -> str:
        """How the processes' output ends."""
        paths = [self.output, self.settings.logs_dir / "engine-0.log"]
        return "\n".join(path.read_text()[-5000:] for path in paths if path.exists())

    async def is_ready(self) -> bool:
        return (await self.get("/readyz"))[0] == 200

    async def stop(self) -> int:
        """SIGTERM of the whole; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, 60)


@asynccontextmanager
async def a_server(directory: Path) -> AsyncIterator[Served]:
    """A server that is ready; every process of it is gone at the end."""
    base = make_base(directory / "base")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(
        home=directory / "home",
        auth="none",
        port=port,
        log_level="warning",
        drain_timeout_s=5,
        base_model=BaseModelSettings(name=base.name, path=base.path),
        engine=EngineSettings(
            command=(sys.executable, "-m", "tests.fakes.engine"), health_interval_s=0.2, max_loras=2, max_cpu_loras=64
        ),
        jobs=JobSettings(threads=1),
    )
    settings.prepare_directories()
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        served = Served(settings, base, _start(settings), http)
        try:
            await served.until(served.is_ready, "ready")
            yield served
        finally:
            _end(served)


def _start(settings: Settings) -> subprocess.Popen[bytes]:
    with (settings.home / "serve.out").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.long.parts.supervisor", "--home", str(settings.home)],
            env=os.environ | settings_environment(settings),
            cwd=ROOT,
            stdout=log,
            stderr=log,
        )


def _end(served: Served) -> None:
    if served.process.poll() is None:
        parts = [served.part(name) for name in PARTS]
        served.process.kill()
        served.process.wait()
        for pid in parts:
            if pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    for pid in served.marked():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
