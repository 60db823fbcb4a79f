"""A gateway process with few files, and clients without a key who want them all: customers are served."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.corpus import make_base
from tests.fakes.stack import BASE, Stack, chat_body, until
from tests.fakes.strangers import SAID, strangers
from tests.framing.wire import Wire

ROOT = Path(__file__).resolve().parents[2]
FILES = 256
STRANGERS = 400
CUSTOMER = "127.0.0.2"


@dataclass(frozen=True)
class Gateway:
    """A gateway's process, and the key of a customer."""

    pid: int
    port: int
    key: str
    wires: list[Wire]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def customer(self, source: str = CUSTOMER) -> httpx.AsyncClient:
        """A client with a key, which opens a connection for each request."""
        transport = httpx.AsyncHTTPTransport(local_address=source, limits=httpx.Limits(max_keepalive_connections=0))
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, transport=transport, timeout=20, trust_env=False)

    async def wire(self) -> Wire:
        """A connection that lasts."""
        self.wires.append(await Wire.to(self.port))
        return self.wires[-1]

    def request(self, text: str = "hello", **fields: Any) -> bytes:
        """A completion, as a customer sends it."""
        body = json.dumps(chat_body(text, **fields)).encode()
        return (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running(tmp_path) as found:
        yield found


@asynccontextmanager
async def running(
    tmp_path: Path, *, soft: int = FILES, hard: int = FILES, auth: str = "keys"
) -> AsyncIterator[Gateway]:
    """`python -m gateway.app` over a fake engine."""
    stack = Stack(tmp_path)
    await stack.prepare()
    port = free_port()
    with (tmp_path / "gateway.log").open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.app", "--home", str(stack.settings.home)],
            env=environment(tmp_path, port, TURNOUT_AUTH=auth), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
        )  # fmt: skip
    wires: list[Wire] = []
    try:
        await until(lambda: is_ready(port), timeout_s=60)
        yield Gateway(process.pid, port, stack.keys["inference"], wires)
    finally:
        for wire in wires:
            wire.close()
        process.kill()
        process.wait()
        await stack.__aexit__(None, None, None)


def environment(tmp_path: Path, port: int, **values: str) -> dict[str, str]:
    base = {"TURNOUT_BASE_MODEL__NAME": BASE, "TURNOUT_BASE_MODEL__PATH": str(tmp_path / "base")}
    return {**os.environ, **base, "TURNOUT_PORT": str(port), "TURNOUT_LOG_LEVEL": "warning", **values}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


async def statuses(customer: httpx.AsyncClient, count: int = 20, at_once: int = 10) -> list[int | str]:
    """What became of each request."""
    turns = asyncio.Semaphore(at_once)

    async def ask() -> int | str:
        async with turns:
            try:
                return (await customer.post("/v1/chat/completions", json=chat_body())).status_code
            except httpx.TransportError as error:
                return type(error).__name__

    return await asyncio.gather(*(ask() for _ in range(count)))


async def customers(gateway: Gateway, count: int) -> list[Wire]:
    """Connections that were answered once and are kept."""
    found = []
    for _ in range(count):
        found.append(await gateway.wire())
        assert await asked(found[-1], gateway) == 200
    return found


async def asked(wire: Wire, gateway: Gateway) -> int | None:
    """The status of one more request; None: the connection is gone."""
    await wire.send(gateway.request())
    answer = await wire.answer()
    return None if answer is None else answer.status


# ---- Strangers


async def test_whatever_strangers_hold_open_customers_old_and_new_are_served(gateway: Gateway) -> None:
    """Before there was a limit, none of these fresh customers was: their connections were closed unread."""
    fresh: dict[str, Counter[int | str]] = {}
    kept = await customers(gateway, 20)
    still: dict[str, list[int | None]] = {}
    for kind in SAID:
        async with strangers(gateway.port, kind, count=STRANGERS), gateway.customer() as customer:
            fresh[kind] = Counter(await statuses(customer))
            still[kind] = [await asked(wire, gateway) for wire in kept]

    assert fresh == {kind: {200: 20} for kind in SAID}
    assert still == {kind: [200] * 20 for kind in SAID}


async def test_strangers_from_everywhere_and_from_the_customers_own_address_keep_nobody_out(gateway: Gateway) -> None:
    everywhere = [f"127.1.{number // 250}.{number % 250 + 1}" for number in range(STRANGERS)]

    async with (
        strangers(gateway.port, "silent", count=STRANGERS, sources=everywhere),
        strangers(gateway.port, "no key, then idle", count=50, sources=[CUSTOMER]),
        gateway.customer() as customer,
    ):
        found = Counter(await statuses(customer))
        page = (await customer.get("/metrics")).text

    assert found == {200: 20}
    assert 'turnout_connections_cut_total{reason="strangers"}' in page


async def test_a_stream_goes_on_while_strangers_come_and_go(gateway: Gateway) -> None:
    wire = await gateway.wire()
    await wire.send(gateway.request("fake:chunks=60 fake:delay_ms=50", stream=True))

    async with strangers(gateway.port, "silent", count=STRANGERS):
        answer = await wire.answer(timeout_s=30)

    assert answer is not None
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_without_keys_who_asks_is_served_whoever_is_silent(tmp_path: Path) -> None:
    async with running(tmp_path, auth="none") as gateway:
        kept = await customers(gateway, 20)
        async with strangers(gateway.port, "silent", count=STRANGERS):
            async with gateway.customer(source="127.0.0.1") as anybody:
                del anybody.headers["authorization"]
                found = await statuses(anybody)
            still = [await asked(wire, gateway) for wire in kept]

    assert Counter(found) == {200: 20}
    assert still == [200] * 20


# ---- Files


async def test_files_are_raised_to_the_hard_limit(tmp_path: Path) -> None:
    async with running(tmp_path, soft=140, hard=1000) as gateway, gateway.customer() as customer:
        page = (await customer.get("/metrics")).text

        assert psutil.Process(gateway.pid).rlimit(psutil.RLIMIT_NOFILE) == (1000, 1000)
    assert "turnout_connections_limit 452.0" in page


def test_too_few_files_are_told_at_the_start(tmp_path: Path) -> None:
    make_base(tmp_path / "base", name=BASE)
    done = subprocess.run(
        [sys.executable, "-m", "gateway.app", "--home", str(tmp_path / "home")],
        env=environment(tmp_path, 0), capture_output=True, text=True, timeout=60, cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )  # fmt: skip

    assert done.returncode == 1
    assert "this process may open 64 files" in done.stderr
    assert "ulimit -n" in done.stderr
    assert "Traceback" not in done.stderr


async def test_while_something_else_eats_the_files_who_comes_waits_and_then_is_served(gateway: Gateway) -> None:
    kept = await customers(gateway, 5)
    process = psutil.Process(gateway.pid)
    # Files that are open stay open; the next one is refused.
    process.rlimit(psutil.RLIMIT_NOFILE, (3, FILES))
    late = [await gateway.wire() for _ in range(5)]
    for wire in late:
        await wire.send(gateway.request())

    still = [await asked(wire, gateway) for wire in kept]
    waiting = [wire for wire in late if not wire.has_ended]
    process.rlimit(psutil.RLIMIT_NOFILE, (FILES, FILES))
    answers = [await wire.answer() for wire in late]

    assert still == [200] * 5
    assert len(waiting) == 5
    assert [answer and answer.status for answer in answers] == [200] * 5
    async with gateway.customer() as customer:
        assert Counter(await statuses(customer)) == {200: 20}


async def test_strangers_who_hold_the_last_files_go_for_customers(gateway: Gateway) -> None:
    process = psutil.Process(gateway.pid)
    async with strangers(gateway.port, "silent", count=STRANGERS), gateway.customer() as customer:
        # Below what is open now: no connection that ends makes room for two.
        process.rlimit(psutil.RLIMIT_NOFILE, (max(map(fd_number, Path(f"/proc/{gateway.pid}/fd").iterdir())), FILES))
        found = Counter([(await customer.get("/v1/models")).status_code for _ in range(10)])

    assert found == {200: 10}


def fd_number(path: Path) -> int:
    """The file's number."""
    return int(path.name)
