"""The contract of engines, kept by the fake; `tests/e2e/test_50_engine.py` holds real vLLM to the same cases."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway.engine.admin import EngineAdmin, EngineUnreachable
from gateway.engine.self_test import run_self_test, write_adapter
from gateway.settings import EngineSettings
from tests.contract.engine_cases import CASES, LAST_CASES, Case, EngineUnderTest
from tests.corpus import make_adapter, make_base
from tests.fakes.engine import FakeEngine


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[EngineUnderTest]:
    base = make_base(tmp_path / "base")
    one, two = (make_adapter(tmp_path / f"adapter{seed}", base, seed=seed) for seed in (1, 2))
    async with FakeEngine(tmp_path / "e.sock", model_name=base.name, base_path=str(base.path)) as fake:
        admin = EngineAdmin(str(fake.socket), base.name)
        try:
            yield EngineUnderTest(admin, one, two, tmp_path)
        finally:
            await admin.close()


@pytest.mark.parametrize("case", [*CASES, *LAST_CASES], ids=lambda case: case.__name__)
async def test_fake_engine_keeps_the_contract(engine: EngineUnderTest, case: Case) -> None:
    await case(engine)


@pytest.mark.invariant(3)
async def test_self_test_passes_on_an_engine_that_leaks_nothing(engine: EngineUnderTest) -> None:
    directory = write_adapter(engine.scratch / "selftest", {"model.layers.0.mlp.down_proj": (32, 64)})

    found = await run_self_test(engine.admin, directory, EngineSettings())

    assert found.fault is None
    assert await engine.admin.models() == {}


async def test_a_silent_socket_is_unreachable(tmp_path: Path) -> None:
    admin = EngineAdmin(str(tmp_path / "nobody.sock"), "tiny")

    with pytest.raises(EngineUnreachable):
        await admin.is_healthy(timeout_s=1)
    with pytest.raises(EngineUnreachable) as unreachable:
        await admin.models()
    assert str(tmp_path) not in unreachable.value.message

    await admin.close()
