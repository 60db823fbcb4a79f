"""`turnout serve` over a fake engine: what it starts again, what it ends, what outlives it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
import psutil
import pytest

from gateway.registry.models import AdapterVersion
from gateway.settings import load_settings
from gateway.supervisor import backoff_s, settings_environment
from tests.engine_world import ROOT, EngineWorld, an_engine_world

T = TypeVar("T")


class Server:
    """A supervisor's process and what it started."""

    def __init__(self, world: EngineWorld) -> None:
        self.world = world
        self.output = world.settings.home / "serve.out"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        with self.output.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway.supervisor", "--home", str(self.world.settings.home)],
                env=os.environ | settings_environment(self.world.settings),
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        return self.process

    def part(self, module: str) -> psutil.Process | None:
        """The gateway or the controller, if it runs."""
        for process in psutil.process_iter(["cmdline"]):
            argv = process.info["cmdline"] or []
            if module in argv and str(self.world.settings.home) in argv and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def is_another(self, module: str, pid: int) -> bool:
        """Whether the part runs as another process than this."""
        part = self.part(module)
        return part is not None and part.pid != pid

    async def until(self, look: Callable[[], T | None], what: str, timeout_s: float = 40) -> T:
        deadline = time.monotonic() + timeout_s
        while True:
            found = await asyncio.to_thread(look)
            if found:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not in time\n{self.output.read_text()[-5000:]}\n{self.world.log()}")
            await asyncio.sleep(0.05)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.world.settings.url}/readyz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    async def ready(self) -> None:
        await self.until(self.is_ready, "ready")

    async def serves(self, version: AdapterVersion) -> None:
        """Until the engine takes traffic with this version, and the gateway, a process of its own, was told so."""
        await self.world.ready(version)
        await self.until(lambda: self.chat(version.name).status_code == 200, f"{version.name} answers")

    def leftovers(self) -> list[str]:
        """What still runs of this home."""
        parts = [self.part("gateway.app"), self.part("gateway.controller")]
        return [str(part) for part in parts if part] + [str(pid) for pid in self.world.children()]

    def chat(self, model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        return httpx.post(f"{self.world.settings.url}/v1/chat/completions", json=body, timeout=20)


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with an_engine_world(tmp_path) as world:
        world.settings = world.settings.model_copy(update={"port": port, "drain_timeout_s": 5.0})
        made = Server(world)
        try:
            yield made
        finally:
            if made.process.poll() is None:
                made.process.kill()
            made.process.wait()
            for module in ("gateway.app", "gateway.controller"):
                if part := made.part(module):
                    part.kill()


async def test_serves_and_ends_whole(server: Server) -> None:
    one = await server.world.publish(1)
    await server.ready()
    await server.serves(one)
    assert server.chat(one.name).headers["x-turnout-version"] == one.name
    await server.until(lambda: f"Ready: {server.world.settings.url}" in server.output.read_text(), "it says so")

    server.process.send_signal(signal.SIGTERM)

    assert server.process.wait(30) == 0
    assert server.leftovers() == []
    assert (await server.world.replica())["state"] == "stopped"
    assert "Traceback" not in server.output.read_text()


@pytest.mark.invariant(10)
async def test_both_parts_are_started_again_and_the_engine_stays(server: Server) -> None:
    one = await server.world.publish(1)
    await server.ready()
    await server.world.ready(one)
    engine = await server.world.engine_pid()
    old = {module: server.part(module) for module in ("gateway.app", "gateway.controller")}

    for part in old.values():
        assert part is not None
        part.kill()
    for module, before in old.items():
        assert before is not None
        await server.until(partial(server.is_another, module, before.pid), f"{module} is back")
    await server.ready()
    two = await server.world.publish(2)
    await server.serves(one)
    await server.serves(two)

    assert await server.world.engine_pid() == engine


@pytest.mark.invariant(10)
async def test_killed_it_takes_its_parts_along_and_the_next_adopts_the_engine(server: Server) -> None:
    one = await server.world.publish(1)
    await server.ready()
    await server.world.ready(one)
    engine = await server.world.engine_pid()

    server.process.kill()
    server.process.wait()
    await server.until(lambda: server.leftovers() == [str(engine)], "only the engine is left")
    server.start()
    await server.ready()
    await server.serves(one)

    assert await server.world.engine_pid() == engine


async def test_a_second_one_over_the_same_home_is_refused(server: Server) -> None:
    await server.ready()
    found = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "gateway.supervisor", "--home", str(server.world.settings.home)],
        env=os.environ | settings_environment(server.world.settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == 1
    assert "already runs" in found.stderr
    assert server.is_ready()


async def test_a_failing_engine_is_told_of_on_the_terminal_and_to_whoever_waits(server: Server) -> None:
    server.world.order(die_at_start="CUDA is [on] fire")

    done = await asyncio.to_thread(turnout, server, "status", "--wait")

    assert done.returncode == 1, done.stdout + done.stderr
    assert "engine-0 failed 3 times in a row; the last time: the engine's process ended with 1" in done.stdout
    assert "CUDA is [on] fire" in done.stdout
    assert "CUDA is [on] fire" in done.stderr
    assert "(engine_never_ready)" in done.stderr
    said = server.output.read_text()
    assert "The engine failed: the engine's process ended with 1; its last words: CUDA is [on] fire" in said
    assert "The engine failed (2 times in a row)" in said
    assert "engine not reached" not in said
    assert server.process.poll() is None, "the server goes on: the next start may do better"

    server.world.order()
    again = await asyncio.to_thread(turnout, server, "status", "--wait")

    assert again.returncode == 0, again.stdout + again.stderr


def turnout(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command against the server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TURNOUT_")}
    environment = kept | {"TURNOUT_URL": server.world.settings.url, "COLUMNS": "400"}
    argv = [sys.executable, "-m", "gateway.cli", *arguments]
    return subprocess.run(argv, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


async def test_gives_up_on_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with an_engine_world(tmp_path) as world:
            world.settings = world.settings.model_copy(update={"port": taken.getsockname()[1]})
            server = Server(world)

            status = await asyncio.to_thread(server.process.wait, 60)

            assert status == 1
            assert "TURNOUT_PORT" in server.output.read_text()
            assert server.leftovers() == []


def test_children_get_the_very_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "turnout.yaml").write_text("engine:\n  max_loras: 7\n  command: [/opt/engine, --flag]\nport: 9000\n")
    mine = load_settings(home=home, auth="none", drain_timeout_s=1.5)
    for name, value in settings_environment(mine).items():
        monkeypatch.setenv(name, value)
    (home / "turnout.yaml").write_text("port: 9999\n")

    assert load_settings(home=home).model_dump() == mine.model_dump()


def test_the_pause_grows_to_a_cap() -> None:
    assert [backoff_s(n) for n in (0, 1, 2, 3)] == [0, 0.25, 0.5, 1.0]
    assert backoff_s(500) == 30
