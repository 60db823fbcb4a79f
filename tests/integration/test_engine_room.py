"""More versions than places, loads that fail, versions that are let out or given up: on real controllers and fake engines."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from sqlalchemy import update

from gateway import tables
from gateway.database import DEFAULT_PROJECT
from gateway.engine.residency_rows import names_held
from gateway.errors import Conflict
from gateway.ids import now
from gateway.keys import ANONYMOUS
from gateway.registry.models import AdapterVersion, VersionState
from gateway.registry.retirement import Retirement
from gateway.rollouts.promotion import Promotions
from tests.engine_world import EngineWorld, an_engine_world

BY = {"reason": "a test", "actor": "key:test", "project_id": DEFAULT_PROJECT}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[EngineWorld]:
    """An engine with room for three."""
    async with an_engine_world(tmp_path, max_cpu_loras=4) as made:
        yield made


async def engine(world: EngineWorld) -> dict[str, Any]:
    """What the engine says of itself; that it forgot nothing it may be asked for is checked each time."""
    connector = aiohttp.UnixConnector(str(world.socket()))
    async with aiohttp.ClientSession(connector=connector) as session, session.get("http://engine/fake/state") as answer:
        found: dict[str, Any] = await answer.json()
    assert (found["forgotten"], found["reread"]) == ([], [])
    return found


async def promote(world: EngineWorld, version: AdapterVersion) -> None:
    await Promotions(world.database).promote(
        version.adapter, version.name, force=True, reason="a test", principal=ANONYMOUS
    )


async def row_of(world: EngineWorld, version: AdapterVersion) -> dict[str, Any]:
    return (await world.residency()).get(version.engine_name, {})


@pytest.mark.invariant(5)
@pytest.mark.invariant(7)
async def test_each_new_version_gets_in_without_a_restart_and_routes_keep_theirs(world: EngineWorld) -> None:
    first, second = await world.publish(1), await world.publish(2)
    world.start_controller()
    before = await world.ready(first, second)
    await promote(world, first)
    await promote(world, second)

    for seed in range(3, 10):
        newest = await world.publish(seed)
        await world.ready(first, second, newest)
        await engine(world)

    refused = [row for row in (await world.residency()).values() if row["state"] == "refused"]
    assert {row["code"] for row in refused} == {"capacity_exhausted"}
    assert (await world.replica())["epoch"] == before["epoch"]
    assert len((await engine(world))["adapters"]) == 3


async def test_a_rollback_to_what_was_refused_for_room_is_answered_soon(world: EngineWorld) -> None:
    versions = [await world.publish(seed) for seed in range(1, 4)]
    world.start_controller()
    await world.ready(*versions)
    for version in versions:
        await promote(world, version)
    newer = await world.publish(4)
    await world.ready(newer)
    await world.settled(versions[0], "refused")

    await Promotions(world.database).rollback("support", to="support@1", accept_load=True, principal=ANONYMOUS)

    await world.ready(versions[0])
    await engine(world)


async def test_more_live_versions_than_places_is_said_and_the_highest_rank_wins(world: EngineWorld) -> None:
    versions = [await world.publish(1, adapter=f"adapter-{number}") for number in range(4)]
    world.start_controller()
    await world.ready(versions[3])
    async with world.database.write() as connection:
        for version in versions:
            mine = tables.routes.c.name == version.adapter
            await connection.execute(update(tables.routes).where(mine).values(stable=version.name))

    await world.ready(*versions[:3])

    row = await world.settled(versions[3], "refused")
    assert row["code"] == "capacity_exhausted"
    assert "4 by routes" in row["reason"]


async def test_what_answers_is_not_unloaded_before_it_has_ended(world: EngineWorld) -> None:
    versions = [await world.publish(seed) for seed in range(1, 4)]
    world.start_controller()
    await world.ready(*versions)
    old = versions[0]
    table = tables.adapter_versions

    async def answering() -> None:  # as gateways note it every second
        async with world.database.write() as connection:
            await connection.execute(update(table).where(table.c.id == old.id).values(used_at=now()))

    async with world.database.write() as connection:
        values = {"stable": versions[1].name, "previous": versions[2].name, "candidate": "support@4"}
        await connection.execute(update(tables.routes).values(**values))
    await answering()
    new = await world.publish(4)

    async def withdrawn() -> bool:
        await answering()
        return (await row_of(world, old)).get("state") != "ready"

    await world.until(withdrawn, "no gateway sends it anything more")
    for _ in range(20):
        await answering()
        assert old.engine_name in (await engine(world))["adapters"]
        assert (await row_of(world, new)).get("state") != "ready"
    await world.ready(new)
    assert old.engine_name not in (await engine(world))["adapters"]


async def test_one_refusal_condemns_nobody(world: EngineWorld) -> None:
    one = await world.publish(1)
    world.order(refuse=[one.engine_name])
    world.start_controller()
    row = await world.settled(one, "waiting")

    world.order()

    await world.ready(one)
    assert row["code"] == "engine_refused"
    assert (await world.registry.version(one.name)).state is VersionState.VERIFIED


@pytest.mark.long
async def test_a_stable_version_is_never_condemned_for_what_kills_the_engine(world: EngineWorld) -> None:
    """As when memory is short: each reload of it is killed, and the others load."""
    stable, other = await world.publish(1), await world.publish(2, adapter="billing")
    world.start_controller()
    await world.ready(stable, other)
    await promote(world, stable)
    world.order(die_on_load=[stable.engine_name])

    os.kill(await world.engine_pid(), signal.SIGKILL)

    async def died_again_and_again() -> bool:
        return any(row["attempt"] >= 4 for row in await world.rows(tables.processes))

    await world.until(died_again_and_again, "two reloads were killed beside the first death", timeout_s=90)
    await world.ready(other)
    assert (await world.registry.version(stable.name)).state is VersionState.VERIFIED

    world.order()
    await world.ready(stable, other, timeout_s=90)


@pytest.mark.long
async def test_a_stable_version_that_the_engine_refuses_stays_and_says_why(world: EngineWorld) -> None:
    stable = await world.publish(1)
    world.start_controller()
    before = await world.ready(stable)
    await promote(world, stable)
    world.order(refuse=[stable.engine_name])
    os.kill(await world.engine_pid(), signal.SIGKILL)

    async def refused_often() -> bool:
        replica = await world.replica()
        if replica["state"] != "ready" or replica["epoch"] == before["epoch"]:
            return False
        calls: list[str] = (await engine(world))["calls"]
        return calls.count(f"refuse {stable.engine_name}") > 3

    await world.until(refused_often, "it is refused more often than condemns others", timeout_s=60)
    row = await world.settled(stable, "waiting")
    assert row["code"] == "engine_refused"
    world.order()
    await world.ready(stable, timeout_s=90)


async def test_numbers_that_are_none_condemn_a_stable_version_too(world: EngineWorld) -> None:
    stable = await world.publish(1)
    world.start_controller()
    await world.ready(stable)
    await promote(world, stable)
    world.order(nan=[stable.engine_name])

    os.kill(await world.engine_pid(), signal.SIGKILL)

    async def quarantined() -> bool:
        return (await world.registry.version(stable.name)).state is VersionState.QUARANTINED

    await world.until(quarantined, "it is quarantined")


async def test_a_released_version_waits_for_its_verification_and_then_loads(world: EngineWorld) -> None:
    one = await world.publish(1)
    world.order(silent_adapters=[one.engine_name])
    world.start_controller()
    await world.settled(one, "quarantined")
    world.order()

    released = await Retirement(world.database, world.registry).release(one.name, **BY)

    assert (released.state, released.state_code) == (VersionState.RECEIVED, None)
    assert one.engine_name not in await world.residency()
    await world.registry.set_state(one.id, VersionState.VERIFIED, code=None, reason=None, actor="test")
    await world.ready(one)


@pytest.mark.invariant(5)
async def test_the_bytes_of_a_retired_version_stay_while_the_engine_may_read_them(world: EngineWorld) -> None:
    one, two = await world.publish(1), await world.publish(2)
    world.start_controller()
    await world.ready(one, two)

    await Retirement(world.database, world.registry).retire(one.name, **BY)

    async def unloaded() -> bool:
        return one.engine_name not in (await engine(world))["adapters"]

    await world.until(unloaded, "it is unloaded")
    async with world.database.read() as connection:
        assert one.engine_name in await names_held(connection, world.settings.run_dir)
    assert await Retirement(world.database, world.registry).remove_unneeded_bytes(held_by(world)) == []
    assert world.registry.directory(one).exists()

    os.kill(await world.engine_pid(), signal.SIGKILL)

    async def gone() -> bool:
        return not world.registry.directory(one).exists()

    await world.until(gone, "its bytes are gone")
    await world.ready(two)
    assert world.registry.directory(two).exists()
    with pytest.raises(Conflict, match="publish the same bundle again"):
        await Retirement(world.database, world.registry).restore(one.name, **BY)
    await world.publish_again(1)
    await world.ready(one, two)


def held_by(world: EngineWorld) -> Any:
    async def held(connection: Any) -> set[str]:
        return await names_held(connection, world.settings.run_dir)

    return held
