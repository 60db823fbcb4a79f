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

import httpx
import pytest

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
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def customer(self, source: str = CUSTOMER) -> httpx.AsyncClient:
        """A client with a key, which opens a connection for each request."""
        transport = httpx.AsyncHTTPTransport(local_address=source, limits=httpx.Limits(max_keepalive_connections=0))
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, transport=transport, timeout=20, trust_env=False)

    def request(self) -> bytes:
        """A completion, as a customer sends it."""
        body = json.dumps(chat_body()).encode()
        return (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self.key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running(tmp_path) as found:
        yield found


@asynccontextmanager
async def running(tmp_path: Path, *, soft: int = FILES, hard: int = FILES, auth: str = "keys") -> AsyncIterator[Gateway]:
    """`python -m gateway.app` over a fake engine."""
    stack = Stack(tmp_path)
    await stack.prepare()
    port = free_port()
    environment = {
        **os.environ, "TURNOUT_PORT": str(port), "TURNOUT_AUTH": auth, "TURNOUT_BASE_MODEL__NAME": BASE,
        "TURNOUT_BASE_MODEL__PATH": str(tmp_path / "base"), "TURNOUT_LOG_LEVEL": "warning",
    }  # fmt: skip
    log = tmp_path / "gateway.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway.app", "--home", str(stack.settings.home)],
            env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
        )  # fmt: skip
    try:
        await until(lambda: is_ready(port), timeout_s=60)
        yield Gateway(process.pid, port, stack.keys["inference"], log)
    finally:
        process.kill()
        process.wait()
        await stack.__aexit__(None, None, None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


async def statuses(customer: httpx.AsyncClient, count: int = 60, at_once: int = 6) -> list[int | str]:
    """What became of each request."""
    turns = asyncio.Semaphore(at_once)

    async def ask() -> int | str:
        async with turns:
            try:
                return (await customer.post("/v1/chat/completions", json=chat_body())).status_code
            except httpx.TransportError as error:
                return type(error).__name__

    return await asyncio.gather(*(ask() for _ in range(count)))


@pytest.mark.parametrize("kind", SAID)
async def test_whatever_strangers_hold_open_each_fresh_customer_is_served(gateway: Gateway, kind: str) -> None:
    async with strangers(gateway.port, kind, count=STRANGERS), gateway.customer() as customer:
        found = await statuses(customer)

    assert Counter(found) == {200: len(found)}
