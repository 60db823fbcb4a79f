"""What a real engine cannot be used after, or must be started otherwise for: an engine for each."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.engine.launch import build_command, build_environment, default_threads, parse_arguments
from gateway.engine.admin import EngineAdmin, EngineUnreachable
from gateway.engine.fleet import engine_spec
from gateway.engine.self_test import SelfTest
from gateway.registry.base_family import BaseFamily
from gateway.settings import BaseModelSettings, Settings
from tests.contract.engine_cases import LAST_CASES, Case, EngineUnderTest

from .stack import BASE, BASE_PATH
from .test_50_engine import opened, self_test

pytestmark = [pytest.mark.engine, pytest.mark.long]

START_S = 540


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


@pytest.mark.parametrize("case", LAST_CASES, ids=lambda case: case.__name__)
def test_real_engine_keeps_the_last_of_the_contract(case: Case, weights: Path, tmp_path: Path) -> None:
    async def kept(path: str) -> None:
        async with opened(path) as admin:
            await case(EngineUnderTest(admin, weights / "seed1", weights / "seed2", tmp_path))

    with running_engine() as (_, path):
        asyncio.run(kept(path))


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
