"""Which adapters real vLLM keeps: what the controller's accounting of unloaded ones rests on. One start of the engine."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import pytest

from deploy.engine.launch import build_environment, default_threads
from gateway.engine.admin import EngineAdmin
from gateway.engine.fleet import engine_slots
from gateway.settings import BaseModelSettings, Settings

from .stack import BASE, BASE_PATH
from .test_50_engine import opened
from .test_60_own_engine import running_engine

pytestmark = [pytest.mark.engine, pytest.mark.long]


class Memory:
    """The numbers that the engine's workers hold, by the name of the load that each came with."""

    def __init__(self, admin: EngineAdmin, folder: Path) -> None:
        self._admin = admin
        self._folder = folder
        self.numbers: dict[str, int] = {}

    async def held(self) -> set[int]:
        """As the workers themselves say."""
        connector = aiohttp.UnixConnector(self._admin.socket)
        async with aiohttp.ClientSession(connector=connector) as session:
            body = {"method": "list_loras"}
            async with session.post("http://engine/collective_rpc", json=body) as answer:
                assert answer.status == 200, await answer.text()
                [found] = (await answer.json())["results"]
        return {int(number) for number in re.findall(r"\d+", str(found))}

    async def load(self, name: str) -> set[int]:
        """Load under a new name; the numbers that went for it."""
        before = await self.held()
        await self._admin.load(name, self._folder)
        after = await self.held()
        [self.numbers[name]] = after - before
        return before - after

    async def touch(self, names: Sequence[str]) -> None:
        """As the controller does before a load into a full memory."""
        for name in names:
            await self._admin.generate(name, (0,), max_tokens=1)


@pytest.mark.invariant(5)
def test_an_unloaded_adapter_is_forgotten_once_it_is_the_least_recently_used(weights: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, base_model=BaseModelSettings(name=BASE, path=BASE_PATH))
    usual = build_environment(os.environ, kv_cache_gib=2, threads=default_threads(), cache_dir=None, on_cpu=True)
    with running_engine(environment=usual | {"VLLM_SERVER_DEV_MODE": "1"}) as (_, path):
        asyncio.run(_forgets_what_is_least_recently_used(path, weights / "seed1", engine_slots(settings)))


async def _forgets_what_is_least_recently_used(path: str, folder: Path, slots: int) -> None:
    async with opened(path) as admin:
        memory = Memory(admin, folder)
        names = [f"memory.v{number}.x" for number in range(1, slots + 1)]
        for name in names:
            assert await memory.load(name) == set(), "there is room"
        ghost, *listed = names
        await memory.touch([*listed, ghost])
        await admin.unload(ghost)

        assert memory.numbers[ghost] in await memory.held(), "unloading frees no memory"
        assert await memory.load("untouched.v1.x") == {memory.numbers[listed[0]]}, "not what was unloaded goes"

        await admin.unload(listed.pop(0))
        listed.append("untouched.v1.x")
        await memory.touch(listed)
        assert await memory.load("touched.v1.x") == {memory.numbers[ghost]}
        assert {memory.numbers[name] for name in [*listed, "touched.v1.x"]} <= await memory.held()
