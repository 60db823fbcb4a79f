"""The stack's own engine, asked directly: the contract, base integrity, and what it lets the network see.

Everything above it was killed, so that nobody else asks it anything; the last test starts that again over the same engine.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from gateway.engine.admin import EngineAdmin
from gateway.engine.self_test import SelfTest, run_self_test, write_adapter
from gateway.processes import group_members
from gateway.registry.base_family import BaseFamily
from gateway.settings import EngineSettings, Settings
from tests.contract.engine_cases import CASES, Case, EngineUnderTest
from tests.corpus import make_adapter

from .stack import BASE, BASE_PATH, Stack, ask, engine_pid, pids, wait_for

pytestmark = [pytest.mark.engine]

PROMPTS = tuple(tuple(range(100 + 40 * number, 112 + 40 * number)) for number in range(6))
CANDIDATES = tuple(range(300, 320))


@asynccontextmanager
async def opened(path: str) -> AsyncIterator[EngineAdmin]:
    admin = EngineAdmin(path, BASE)
    try:
        yield admin
    finally:
        await admin.close()


@pytest.fixture(scope="module")
def running(stack: Stack, alpha: str) -> Iterator[tuple[int, str]]:
    """The engine's pid and socket; nothing else of the stack runs until the last test of this file."""
    pid = engine_pid(stack)
    [path] = Settings(home=stack.home).run_dir.glob("engine-*.sock")
    stack.kill_supervisor()
    yield pid, str(path)
    if not pids(stack, "gateway.app"):
        stack.start()


@pytest.fixture
async def engine(running: tuple[int, str], weights: Path, tmp_path: Path) -> AsyncIterator[EngineUnderTest]:
    async with opened(running[1]) as admin:
        yield EngineUnderTest(admin, weights / "seed1", weights / "seed2", tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_real_engine_keeps_the_contract(engine: EngineUnderTest, case: Case) -> None:
    await case(engine)


async def self_test(admin: EngineAdmin, base: BaseFamily, folder: Path) -> SelfTest:
    return await run_self_test(admin, write_adapter(folder, base.module_shapes), EngineSettings())


@pytest.mark.invariant(3)
async def test_self_test_passes_with_the_plugin(
    engine: EngineUnderTest, base_family: BaseFamily, tmp_path: Path
) -> None:
    found = await self_test(engine.admin, base_family, tmp_path)

    assert found.fault is None
    assert found.leak <= max(found.batch_noise, 0.05), "beside adapters base is as far from itself as beside base"
    assert found.effect > 10 * found.batch_noise


@pytest.mark.invariant(2)
@pytest.mark.invariant(3)
async def test_nobody_in_a_mixed_batch_gets_anothers_weights(
    engine: EngineUnderTest, base_family: BaseFamily, tmp_path: Path
) -> None:
    """Base and four adapters, alone and all at once; the adapters touch every linear layer and fill every slot."""
    modules = sorted({name.rpartition(".")[2] for name in base_family.module_shapes})
    names = [f"mixed.v{seed}.x" for seed in range(1, 5)]
    for seed, name in enumerate(names, start=1):
        folder = make_adapter(tmp_path / name, base_family, seed=seed, rank=4 * seed, scale=0.5, modules=modules)
        await engine.admin.load(name, folder)
    models = [BASE, *names]
    alone = {(m, p): await engine.admin.first_token(m, p, CANDIDATES) for m in models for p in PROMPTS}

    company = [asyncio.create_task(engine.admin.generate(name, PROMPTS[0], max_tokens=60)) for name in names]
    keys = [key for _ in range(2) for key in alone]
    together = await asyncio.gather(*(engine.admin.first_token(m, p, CANDIDATES) for m, p in keys))
    assert not any(task.done() for task in company), "they kept company all the time"
    await asyncio.gather(*company)

    for (model, prompt), found in zip(keys, together, strict=True):
        far = {other: distance(found, alone[other, prompt]) for other in models}
        # A batch of another shape rounds otherwise, by tenths of a nat on some processors; two adapters differ by nats.
        assert far[model] < min(far[other] for other in models if other != model) / 2, (model, far)
    for name in names:
        await engine.admin.unload(name)


def distance(one: list[float], other: list[float]) -> float:
    return statistics.median(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.heavy
@pytest.mark.parametrize("system", ["Answer with JSON.", None], ids=["system", "no_system"])
async def test_a_chat_reaches_the_model_as_it_was_trained(running: tuple[int, str], system: str | None) -> None:
    """What the engine makes of a chat is, token for token, what stood before the answer in training."""
    from trainer.data import encode_chat, load_tokenizer

    asked = [{"role": "user", "content": "Where is my lamp?\n\nOrder AB-1234."}]
    if system is not None:
        asked.insert(0, {"role": "system", "content": system})
    trained = encode_chat(
        [*asked, {"role": "assistant", "content": "Here."}], load_tokenizer(BASE_PATH), max_length=512
    )
    assert not isinstance(trained, str), trained
    before_the_answer = next(number for number, label in enumerate(trained.labels) if label != -100)

    async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=running[1]), timeout=30) as client:
        answer = await client.post("http://engine/tokenize", json={"model": BASE, "messages": asked})

    assert answer.json()["tokens"] == list(trained.input_ids[:before_the_answer])


@pytest.mark.invariant(9)
def test_no_http_answers_on_any_port(running: tuple[int, str]) -> None:
    """torch.distributed opens ports on the loopback; none of them speaks HTTP, and none is open to others."""
    for pid in group_members(os.getpgid(running[0])):
        for found in psutil.Process(pid).net_connections("inet"):
            if found.status != psutil.CONN_LISTEN:
                continue
            assert found.laddr.ip in ("127.0.0.1", "::1")
            assert not answers_http(found.laddr.port), f"port {found.laddr.port} speaks HTTP"


def answers_http(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            return connection.recv(8).startswith(b"HTTP/")
    except OSError:
        return False


@pytest.mark.invariant(10)
def test_the_next_start_takes_the_engine_over_as_it_is(stack: Stack, running: tuple[int, str]) -> None:
    stack.start()

    assert engine_pid(stack) == running[0]
    for version in ("alpha@1", "alpha@2"):
        wait_for(lambda: ask(stack, version).status_code == 200, timeout_s=120, what=f"{version} answers")  # noqa: B023
