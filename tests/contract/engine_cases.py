"""What Turnout relies on in an engine. Each case runs against the fake and against real vLLM: a fake that drifts fails here.

Cases share one engine, so each uses names of its own and leaves nothing loaded that the next would meet.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from gateway.engine.admin import EngineAdmin, EngineRefused, NotFinite

PROMPT = (5, 6, 7, 8)
CANDIDATES = tuple(range(10, 20))


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine, its base model's name, and two good adapters for it."""

    admin: EngineAdmin
    one: Path
    two: Path
    scratch: Path


Case = Callable[[EngineUnderTest], Awaitable[None]]


async def lists_what_is_loaded_with_its_path(engine: EngineUnderTest) -> None:
    await engine.admin.load("listed.v1.a", engine.one)

    assert (await engine.admin.models())["listed.v1.a"] == str(engine.one)

    await engine.admin.unload("listed.v1.a")
    assert "listed.v1.a" not in await engine.admin.models()


async def refuses_a_name_that_is_taken(engine: EngineUnderTest) -> None:
    await engine.admin.load("taken.v1.a", engine.one)

    with pytest.raises(EngineRefused, match="already been loaded") as refused:
        await engine.admin.load("taken.v1.a", engine.two)

    assert refused.value.status == 400
    assert (await engine.admin.models())["taken.v1.a"] == str(engine.one)
    await engine.admin.unload("taken.v1.a")


async def refuses_the_base_models_name(engine: EngineUnderTest) -> None:
    with pytest.raises(EngineRefused) as refused:
        await engine.admin.load(engine.admin.base_model, engine.one)

    assert refused.value.status == 400


async def refuses_a_path_that_is_not_there(engine: EngineUnderTest) -> None:
    with pytest.raises(EngineRefused) as refused:
        await engine.admin.load("missing.v1.a", engine.scratch / "nothing")

    assert refused.value.status == 404
    assert str(engine.scratch) not in refused.value.message, "its words name the path, and clients may read this"
    assert "missing.v1.a" not in await engine.admin.models()


async def survives_weights_that_are_garbage(engine: EngineUnderTest) -> None:
    broken = engine.scratch / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "adapter_config.json").write_bytes((engine.one / "adapter_config.json").read_bytes())
    (broken / "adapter_model.safetensors").write_bytes(b"\xff" * 64)

    with pytest.raises(EngineRefused, match=r"Call to add_lora method failed|its own words") as refused:
        await engine.admin.load("broken.v1.a", broken)

    assert refused.value.status == 500
    assert "broken.v1.a" not in await engine.admin.models()
    assert await engine.admin.is_healthy(timeout_s=10)


async def unloading_what_is_not_there_is_nothing(engine: EngineUnderTest) -> None:
    await engine.admin.unload("never.v1.a")


async def refuses_requests_for_what_it_does_not_hold(engine: EngineUnderTest) -> None:
    with pytest.raises(EngineRefused, match="does not exist") as refused:
        await engine.admin.generate("unknown.v1.a", PROMPT, max_tokens=1)

    assert refused.value.status == 404


async def gives_the_asked_candidates_the_same_each_time(engine: EngineUnderTest) -> None:
    first = await engine.admin.first_token(engine.admin.base_model, PROMPT, CANDIDATES)
    again = await engine.admin.first_token(engine.admin.base_model, PROMPT, CANDIDATES)

    assert len(first) == len(CANDIDATES)
    assert all(value < 0 for value in first)
    assert first == again


async def adapters_change_the_answer_each_in_its_way(engine: EngineUnderTest) -> None:
    await engine.admin.load("changes.v1.a", engine.one)
    await engine.admin.load("changes.v2.b", engine.two)
    models = (engine.admin.base_model, "changes.v1.a", "changes.v2.b")

    base, one, two = [await engine.admin.first_token(model, PROMPT, CANDIDATES) for model in models]

    assert max(abs(a - b) for a, b in zip(base, one, strict=True)) > 0.01
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) > 0.01
    for name in models[1:]:
        await engine.admin.unload(name)


async def answers_with_base_when_no_model_is_named(engine: EngineUnderTest) -> None:
    """The reason why the gateway refuses such a request itself."""
    body = {"prompt": list(PROMPT), "max_tokens": 1}
    connector = aiohttp.UnixConnector(engine.admin.socket)
    session = aiohttp.ClientSession(connector=connector)
    async with session, session.post("http://engine/v1/completions", json=body) as answer:
        assert answer.status == 200


async def speaks_until_it_is_cut_off_when_the_end_is_ignored(engine: EngineUnderTest) -> None:
    company = asyncio.create_task(engine.admin.generate(engine.admin.base_model, PROMPT, max_tokens=40))

    await engine.admin.first_token(engine.admin.base_model, PROMPT, CANDIDATES)

    assert not company.done()
    await company


async def a_poisoned_adapter_loads_and_is_caught_by_its_numbers(engine: EngineUnderTest) -> None:
    """Last: what it leaves in a real engine's cache is the reason why such an engine is restarted."""
    poisoned = engine.scratch / "poisoned"
    poisoned.mkdir(exist_ok=True)
    raw = (engine.one / "adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == {"F32"}
    (poisoned / "adapter_model.safetensors").write_bytes(raw[:start] + b"\x00\x00\xc0\x7f" * ((len(raw) - start) // 4))
    (poisoned / "adapter_config.json").write_bytes((engine.one / "adapter_config.json").read_bytes())
    await engine.admin.load("poisoned.v1.a", poisoned)

    with pytest.raises(NotFinite):
        await engine.admin.first_token("poisoned.v1.a", PROMPT, CANDIDATES)

    await engine.admin.unload("poisoned.v1.a")


CASES: tuple[Case, ...] = (
    lists_what_is_loaded_with_its_path,
    refuses_a_name_that_is_taken,
    refuses_the_base_models_name,
    refuses_a_path_that_is_not_there,
    survives_weights_that_are_garbage,
    unloading_what_is_not_there_is_nothing,
    refuses_requests_for_what_it_does_not_hold,
    gives_the_asked_candidates_the_same_each_time,
    adapters_change_the_answer_each_in_its_way,
    answers_with_base_when_no_model_is_named,
    speaks_until_it_is_cut_off_when_the_end_is_ignored,
)
LAST_CASES: tuple[Case, ...] = (a_poisoned_adapter_loads_and_is_caught_by_its_numbers,)
