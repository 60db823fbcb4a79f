"""What is told while an engine starts, fails to, or falls silent later."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway import logs
from gateway.engine.admin import EngineAdmin, EngineUnreachable
from gateway.engine.fleet import LocalFleet, engine_spec
from gateway.engine.replicas import ReplicaKeeper
from gateway.logs import Seldom
from gateway.processes import ProcessTable, home_marker
from tests.engine_world import EngineWorld, an_engine_world
from tests.fakes.engine import FakeEngine


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[EngineWorld]:
    async with an_engine_world(tmp_path, self_test=False, health_interval_s=0.01) as made:
        yield made


@asynccontextmanager
async def a_keeper(world: EngineWorld, told: list[str]) -> AsyncIterator[ReplicaKeeper]:
    """In the test's own process, so that its log can be read."""
    fleet = LocalFleet(ProcessTable(world.database, home_marker(world.settings.home)))
    spec = engine_spec(world.settings)
    keeper = ReplicaKeeper(world.database, world.settings, world.registry, fleet, spec, tell=told.append)
    await keeper.start()
    try:
        yield keeper
    finally:
        await keeper.close()


async def tick_until(keeper: ReplicaKeeper, condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await keeper.tick()
            await asyncio.sleep(0.01)


async def test_a_slow_start_is_a_line_now_and_then_that_says_what_it_waits_for(
    world: EngineWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_FIRST_AFTER_S", 0.1)
    world.order(load_until_told=True)

    def lines() -> list[Any]:
        return [entry for entry in log if entry["event"] == "waiting for the engine"]

    with capture_logs() as log:
        async with a_keeper(world, []) as keeper:
            await tick_until(keeper, lambda: len(lines()) == 5 and "Loading weights" in lines()[-1]["log_says"])
            world.order()
            await tick_until(keeper, lambda: log[-1]["event"] == "engine ready")

    assert {line["waits_for"] for line in lines()[:5]} == {"its process to answer"}
    waited = lines()[4]["waited_s"]
    assert waited >= 1, "a start asked for a sign of life a hundred times"
    assert [entry["event"] for entry in log if entry["event"] != "waiting for the engine"] == [
        "engine started",
        "engine ready",
    ]


async def test_a_failed_start_is_told_with_its_reason_and_the_count_stays_while_it_starts_again(
    world: EngineWorld,
) -> None:
    world.order(die_at_start="no room")
    told: list[str] = []

    async with a_keeper(world, told) as keeper:
        await tick_until(keeper, lambda: len(told) == 2)
        world.order(load_until_told=True)
        await tick_until(keeper, lambda: keeper._state == "starting")
        row = await world.replica()
        world.order()
        await tick_until(keeper, lambda: keeper._state == "ready")
        after = await world.replica()

    assert [text.partition(":")[0] for text in told] == ["The engine failed", "The engine failed (2 times in a row)"]
    assert all("the engine's process ended with 1; its last words: no room" in text for text in told)
    assert (row["failures"], row["futile_starts"], row["reason"]) == (2, 2, None)
    assert row["last_failure"].endswith("ends: no room")
    assert (after["failures"], after["futile_starts"]) == (2, 0)


async def test_a_program_that_cannot_be_started_has_a_row_that_says_so(tmp_path: Path) -> None:
    async with an_engine_world(tmp_path, command=("/nonexistent/engine",)) as world:
        told: list[str] = []
        async with a_keeper(world, told) as keeper:
            await tick_until(keeper, lambda: len(told) == 3)
        row = await world.replica()

    assert (row["state"], row["failures"], row["futile_starts"]) == ("failed", 3, 3)
    assert "/nonexistent/engine" in row["last_failure"]


async def test_an_adapter_that_kills_the_engine_makes_no_start_futile(world: EngineWorld) -> None:
    bad = await world.publish(1)
    world.order(die_on_load=[bad.engine_name])
    told: list[str] = []

    async with a_keeper(world, told) as keeper:
        await tick_until(keeper, lambda: len(told) == 2)
        row = await world.replica()
        await tick_until(keeper, lambda: keeper._state == "ready")

    assert (row["failures"], row["futile_starts"]) == (2, 0)


async def test_an_outage_of_a_serving_engine_is_one_warning_and_its_end(tmp_path: Path) -> None:
    async with FakeEngine(tmp_path / "e.sock") as engine:
        admin = EngineAdmin(str(engine.socket), engine.model_name)
        with capture_logs() as log:
            assert await admin.is_healthy(1)
            await engine.stop()
            for _ in range(5):
                with pytest.raises(EngineUnreachable) as caught:
                    await admin.is_healthy(1)
            await engine.start()
            assert await admin.is_healthy(1)
        await admin.close()

    assert [(entry["log_level"], entry["event"]) for entry in log] == [
        ("warning", "engine does not answer"),
        ("info", "engine answers again"),
    ]
    assert "nothing listens on its socket" in caught.value.message


async def test_no_message_about_the_engine_names_a_class_of_the_client_library(tmp_path: Path) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def talk_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort")
        writer.close()

    messages = []
    for number, behaviour in enumerate((hang_up, say_nothing, talk_nonsense)):
        path = tmp_path / f"{number}.sock"
        server = await asyncio.start_unix_server(behaviour, path)
        admin = EngineAdmin(str(path), "tiny")
        with pytest.raises(EngineUnreachable) as caught:
            await admin.is_healthy(0.2)
        messages.append(caught.value.message)
        await admin.close()
        server.close()

    assert messages == [
        "GET /health: the connection broke",
        "GET /health: no answer within 0.2 s",
        "GET /health: its answer cannot be read",
    ]


def test_news_of_a_long_wait_come_at_widening_intervals() -> None:
    seldom = Seldom()

    assert [second for second in range(700) if seldom.is_due(second)] == [10, 20, 40, 80, 160, 320, 640]
