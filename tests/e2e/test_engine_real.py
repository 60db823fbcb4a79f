"""Real vLLM, started as the controller starts it: the contract, base integrity, and what it lets the network see.

Runs after the tests of the whole stack, which ends with them: one engine at a time.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.engine.launch import build_command, build_environment, default_threads, parse_arguments
from gateway.engine.admin import EngineAdmin, EngineUnreachable
from gateway.engine.fleet import engine_spec
from gateway.engine.self_test import SelfTest, run_self_test, write_adapter
from gateway.processes import group_members
from gateway.registry.base_family import BaseFamily
from gateway.settings import BaseModelSettings, EngineSettings, Settings
from tests.contract.engine_cases import CASES, LAST_CASES, Case, EngineUnderTest
from tests.corpus import make_adapter

from .stack import BASE, BASE_PATH

pytestmark = [pytest.mark.engine]

START_S = 540
PROMPTS = tuple(tuple(range(100 + 40 * number, 112 + 40 * number)) for number in range(6))
CANDIDATES = tuple(range(300, 320))


@contextmanager
def running_engine(*, environment: Mapping[str, str] | None = None) -> Iterator[tuple[int, str]]:
    """vLLM in a process group of its own: its pid and socket. `environment` in place of the usual one skips the launcher."""
    with tempfile.TemporaryDirectory(prefix="turnout-engine-") as name:
        home = Path(name)
        settings = Settings(home=home, base_model=BaseModelSettings(name=BASE, path=BASE_PATH))
        settings.prepare_directories()
        spec = engine_spec(settings)
        log = home / "engine.log"
        argv, env = list(spec.argv), spec.env
        if environment is not None:
            argv, env = _without_launcher(argv), dict(environment)
        with log.open("wb") as output:
            process = subprocess.Popen(
                argv, env=env, cwd=spec.cwd, stdout=output, stderr=output, start_new_session=True
            )
        try:
            asyncio.run(_wait_healthy(process, spec.socket, log))
            yield process.pid, spec.socket
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _without_launcher(argv: list[str]) -> list[str]:
    own, rest = parse_arguments(argv[3:])
    return build_command(own.uds, rest)


async def _wait_healthy(process: subprocess.Popen[bytes], path: str, log: Path) -> None:
    admin = EngineAdmin(path, BASE)
    deadline = time.monotonic() + START_S
    try:
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if await admin.is_healthy(timeout_s=2):
                    return
            except EngineUnreachable:
                await asyncio.sleep(0.2)
    finally:
        await admin.close()


@asynccontextmanager
async def opened(path: str) -> AsyncIterator[EngineAdmin]:
    admin = EngineAdmin(path, BASE)
    try:
        yield admin
    finally:
        await admin.close()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[int, str]]:
    with running_engine() as found:
        yield found


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
    for pid in group_members(running[0]):
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


@pytest.mark.parametrize("case", LAST_CASES, ids=lambda case: case.__name__)
async def test_real_engine_keeps_the_last_of_the_contract(engine: EngineUnderTest, case: Case) -> None:
    await case(engine)


@pytest.mark.long
@pytest.mark.invariant(3)
@pytest.mark.mutant(3)
def test_without_the_plugin_the_self_test_fails(base_family: BaseFamily, tmp_path: Path) -> None:
    usual = build_environment(os.environ, kv_cache_gib=2, threads=default_threads(), cache_dir=None, on_cpu=True)

    async def tested(path: str) -> SelfTest:
        async with opened(path) as admin:
            return await self_test(admin, base_family, tmp_path)

    with running_engine(environment=usual | {"VLLM_PLUGINS": ""}) as (_, path):
        fault = asyncio.run(tested(path)).fault

    assert fault is not None
    assert fault.code == "self_test_failed"
