"""Real controllers over fake engines: what survives whose death, and what never reaches traffic."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from gateway import tables
from gateway.controller import child_log
from gateway.engine.fleet import engine_spec
from gateway.jobs.launch import attempt_directory
from gateway.keys import ANONYMOUS
from gateway.processes import MAX_LOG_BYTES, Child, look_at
from gateway.registry.models import AdapterVersion, VersionState
from gateway.rollouts.promotion import Promotions
from gateway.settings import Settings
from tests.engine_world import FAST, EngineWorld, an_engine_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[EngineWorld]:
    async with an_engine_world(tmp_path) as made:
        yield made


async def loaded(world: EngineWorld) -> dict[str, str]:
    """What the engine itself says it holds."""
    cards = (await look_in(world, "/v1/models"))["data"]
    return {card["id"]: card["root"] for card in cards if card["parent"]}


async def calls(world: EngineWorld) -> list[str]:
    """Every load and unload since the engine's start."""
    found: list[str] = (await look_in(world, "/fake/state"))["calls"]
    return found


async def look_in(world: EngineWorld, path: str) -> dict[str, Any]:
    connector = aiohttp.UnixConnector(str(world.socket()))
    async with aiohttp.ClientSession(connector=connector) as session, session.get(f"http://engine{path}") as answer:
        found: dict[str, Any] = await answer.json()
        return found


@pytest.mark.invariant(5)
async def test_loads_probes_and_restores_after_the_engine_is_killed(world: EngineWorld) -> None:
    one, two = await world.publish(1), await world.publish(2)
    world.start_controller()
    before = await world.ready(one, two)

    os.kill(await world.engine_pid(), signal.SIGKILL)
    after = await world.ready(one, two, not_epoch=before["epoch"])

    assert after["self_test"] == "passed"
    assert await loaded(world) == {v.engine_name: str(world.registry.directory(v)) for v in (one, two)}


@pytest.mark.invariant(10)
async def test_a_killed_controller_is_followed_by_one_that_adopts(world: EngineWorld) -> None:
    one = await world.publish(1)
    first = world.start_controller()
    before, pid = await world.ready(one), await world.engine_pid()
    told = await calls(world)

    first.kill()
    first.wait()
    two = await world.publish(2)
    world.start_controller()
    after = await world.ready(one, two)

    assert await world.engine_pid() == pid
    assert after["epoch"] == before["epoch"]
    assert (await calls(world))[len(told) :] == [f"load {two.engine_name}"], "nothing was tested or loaded again"


@pytest.mark.invariant(10)
async def test_an_engine_started_just_before_its_controller_died_is_no_orphan(world: EngineWorld) -> None:
    first = world.start_controller()
    await world.ready()
    orphan = await world.engine_pid()
    first.kill()
    first.wait()
    async with world.database.write() as connection:  # as if the row had never been written
        await connection.execute(tables.processes.delete())

    world.start_controller()

    async def replaced() -> bool:
        rows = [row for row in await world.rows(tables.processes) if row["kind"] == "engine"]
        return bool(rows) and rows[0]["pid"] != orphan and look_at(orphan) is None

    await world.until(replaced, "the orphan is gone and another engine runs")
    await world.ready()
    assert world.children() == [await world.engine_pid()]


@pytest.mark.invariant(10)
async def test_sigterm_of_the_controller_leaves_the_engine(world: EngineWorld) -> None:
    one = await world.publish(1)
    controller = world.start_controller()
    await world.ready(one)
    pid = await world.engine_pid()

    controller.terminate()

    assert controller.wait(15) == 0
    assert world.children() == [pid]
    assert one.engine_name in await loaded(world)


@pytest.mark.invariant(4)
async def test_a_version_that_the_engine_refuses_again_and_again_is_out(world: EngineWorld) -> None:
    good, bad = await world.publish(1), await world.publish(2)
    world.order(refuse=[bad.engine_name])
    world.start_controller()
    await world.ready(good)
    row = await world.settled(bad, "quarantined")

    found = await world.registry.version(bad.name)
    assert (found.state, found.state_code) == (VersionState.QUARANTINED, "engine_refused")
    assert "add_lora method failed" in str(found.state_reason)
    assert row["code"] == "engine_refused"
    assert (await calls(world)).count(f"refuse {bad.engine_name}") == 3
    assert (await world.replica())["state"] == "ready"


@pytest.mark.invariant(4)
async def test_an_adapter_without_effect_never_becomes_ready(world: EngineWorld) -> None:
    bad = await world.publish(1)
    world.order(silent_adapters=[bad.engine_name])
    world.start_controller()

    await world.settled(bad, "quarantined")

    assert (await world.registry.version(bad.name)).state_code == "no_effect"

    async def unloaded() -> bool:
        return bad.engine_name not in await loaded(world)

    await world.until(unloaded, "the adapter is unloaded")


async def test_a_version_that_the_engine_cannot_answer_with_holds_up_nothing(world: EngineWorld) -> None:
    good, bad = await world.publish(1), await world.publish(2)
    world.order(fail=[bad.engine_name])
    world.start_controller()

    await world.ready(good)

    assert await world.until(lambda: _quarantined(world, bad.name), "it is quarantined") == "engine_failed"
    assert {row["attempt"] for row in await world.rows(tables.processes)} == {1}, "the engine was never restarted"


@pytest.mark.invariant(4)
async def test_weights_that_compute_something_else_than_verified_never_become_ready(world: EngineWorld) -> None:
    one = await world.publish(1)
    path = world.settings.references_dir / f"{one.digest}.json"
    text = path.read_text()
    path.write_text(text.replace("-", "-9"))  # -1.2 becomes -91.2
    world.start_controller()

    await world.settled(one, "quarantined")

    assert (await world.registry.version(one.name)).state_code == "parity"


@pytest.mark.invariant(4)
async def test_numbers_that_are_none_cost_the_version_its_place_and_the_engine_its_cache(world: EngineWorld) -> None:
    good, bad = await world.publish(1), await world.publish(2)
    world.start_controller()
    before = await world.ready(good, bad)
    world.order(nan=[bad.engine_name])

    os.kill(await world.engine_pid(), signal.SIGKILL)
    poisoned = await world.until(lambda: _quarantined(world, bad.name), "the version is quarantined")

    async def started_thrice() -> bool:
        return {row["attempt"] for row in await world.rows(tables.processes)} == {3}

    await world.until(started_thrice, "first start, after the kill, after the poisoning")
    await world.ready(good, not_epoch=before["epoch"])
    assert poisoned == "non_finite"
    assert bad.engine_name not in await loaded(world)


async def _quarantined(world: EngineWorld, name: str) -> str | None:
    version = await world.registry.version(name)
    return version.state_code if version.state is VersionState.QUARANTINED else None


def damage(world: EngineWorld, version: AdapterVersion) -> None:
    """Flip a bit of its weights on the disk."""
    weights = world.registry.directory(version) / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(raw)


@pytest.mark.invariant(1)
@pytest.mark.invariant(4)
async def test_changed_bytes_are_never_loaded_and_publishing_them_again_heals(world: EngineWorld) -> None:
    one, two = await world.publish(1), await world.publish(2)
    damage(world, one)
    world.start_controller()

    row = await world.settled(one, "refused")
    await world.ready(two)

    assert row["code"] == "digest_mismatch"
    assert str(world.settings.home) not in row["reason"]
    assert (await world.registry.version(one.name)).state is VersionState.VERIFIED
    assert not [call for call in await calls(world) if one.engine_name in call]

    await world.publish_again(1)
    await world.ready(one, two)


@pytest.mark.invariant(7)
async def test_what_is_loaded_keeps_serving_while_its_files_are_damaged(world: EngineWorld) -> None:
    first = world.start_controller()
    one = await world.publish(1)
    await world.ready(one)
    damage(world, one)

    first.terminate()
    first.wait()
    two = await world.publish(2)
    world.start_controller()
    await world.ready(one, two)

    assert set(await loaded(world)) == {one.engine_name, two.engine_name}
    assert (await world.registry.version(one.name)).state is VersionState.VERIFIED


@pytest.mark.invariant(4)
async def test_received_versions_stay_out_until_they_are_verified(world: EngineWorld) -> None:
    waiting = await world.publish(1, verified=False)
    one = await world.publish(2)
    world.start_controller()

    await world.ready(one)

    assert waiting.engine_name not in await loaded(world)
    assert waiting.engine_name not in await world.residency()


async def test_a_version_under_which_the_engine_dies_twice_is_out(world: EngineWorld) -> None:
    bad = await world.publish(1)
    world.order(die_on_load=[bad.engine_name])
    world.start_controller()

    code = await world.until(lambda: _quarantined(world, bad.name), "it is quarantined")
    await world.ready()

    assert code == "engine_died"


NOISES = [
    0.0,
    0.2,
    0.5,
]  # nats by which the size of a batch moves a log-probability; an adapter here moves it by 0.2 to 0.5


@pytest.mark.invariant(3)
@pytest.mark.mutant(3)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("leak", [{"leak": 1.0}, {"leak": 0.5}, {"leak_beside_adapters": 0.5}], ids=str)
async def test_an_engine_that_leaks_adapters_into_base_takes_no_traffic(
    world: EngineWorld, leak: dict[str, float], noise: float
) -> None:
    one = await world.publish(1)
    world.order(noise=noise, **leak)
    world.start_controller()

    async def failed() -> str | None:
        replica = await world.replica()
        assert replica.get("state") != "ready"
        return replica["reason"] if replica.get("state") == "failed" and replica["self_test"] == "failed" else None

    reason = await world.until(failed, "the self-test fails")

    assert "self_test_failed" in reason
    assert one.engine_name not in await world.residency()


@pytest.mark.invariant(3)
@pytest.mark.parametrize("noise", NOISES)
async def test_an_engine_is_not_condemned_for_the_noise_of_its_batches_nor_an_adapter(
    world: EngineWorld, noise: float
) -> None:
    innocents = [await world.publish(seed) for seed in range(1, 7)]
    world.order(noise=noise)
    world.start_controller()

    replica = await world.ready(*innocents)

    assert {row["attempt"] for row in await world.rows(tables.processes)} == {1}, "the first start came up"
    assert replica["self_test"] == "passed"
    # What it was made with was measured; twice of it where the controller's own question kept base alone company.
    assert 0.9 * noise <= replica["batch_noise"] <= 2 * noise


@pytest.mark.invariant(4)
@pytest.mark.parametrize("noise", NOISES)
async def test_an_adapter_at_half_strength_is_found_at_any_noise(world: EngineWorld, noise: float) -> None:
    good, bad = await world.publish(1), await world.publish(2)
    world.order(noise=noise, strength={bad.engine_name: 0.5})
    world.start_controller()

    await world.ready(good)

    assert await world.until(lambda: _quarantined(world, bad.name), "it is quarantined") == "parity"


async def test_a_hung_engine_is_noticed_and_replaced(world: EngineWorld) -> None:
    one = await world.publish(1)
    world.start_controller()
    before = await world.ready(one)
    hung = await world.engine_pid()

    os.kill(hung, signal.SIGSTOP)
    after = await world.ready(one, not_epoch=before["epoch"])

    assert after["epoch"] != before["epoch"]
    assert hung not in world.children()


async def test_an_engine_whose_server_answers_while_its_core_hangs_is_replaced(world: EngineWorld) -> None:
    one = await world.publish(1)
    world.start_controller()
    before = await world.ready(one)

    world.order(hang=True)

    async def failed() -> str | None:
        replica = await world.replica()
        return replica["last_failure"] if replica.get("epoch") != before["epoch"] else None

    assert "did no work for" in await world.until(failed, "it is started again")


async def test_an_engine_that_computes_is_not_killed_for_being_slow(world: EngineWorld) -> None:
    """For three times the silence that a hung one is allowed."""
    one = await world.publish(1)
    world.start_controller()
    before = await world.ready(one)

    world.order(hang=True, spin=True)
    used = psutil.Process(await world.engine_pid()).cpu_times().user

    async def has_computed() -> bool:
        assert (await world.replica())["epoch"] == before["epoch"], world.log()
        return psutil.Process(await world.engine_pid()).cpu_times().user - used > 3 * FAST["hang_timeout_s"]

    await world.until(has_computed, "it computes on", timeout_s=120)
    world.order()
    await world.ready(one)

    assert (await world.replica())["epoch"] == before["epoch"]


async def test_a_start_that_computes_is_not_given_up_for_time_alone(tmp_path: Path) -> None:
    async with an_engine_world(tmp_path, start_timeout_s=1.0) as world:
        world.order(start="spin")
        world.start_controller()

        async def has_computed() -> bool:
            children = world.children()
            return any(psutil.Process(pid).cpu_times().user > 5.0 for pid in children)

        await world.until(has_computed, "it computes for longer than a start has")
        world.order()
        await world.ready()

        assert {row["attempt"] for row in await world.rows(tables.processes)} == {1}


@pytest.mark.invariant(10)
async def test_two_controllers_one_acts(world: EngineWorld) -> None:
    one = await world.publish(1)
    first, second = world.start_controller(), world.start_controller()
    await world.ready(one)
    (lease,) = await world.rows(tables.leases)
    holder = int(lease["holder"].split("/")[1])
    acting, waiting = (first, second) if first.pid == holder else (second, first)
    pid = await world.engine_pid()

    acting.kill()
    acting.wait()
    two = await world.publish(2)
    await world.ready(one, two)

    (taken,) = await world.rows(tables.leases)
    assert int(taken["holder"].split("/")[1]) == waiting.pid
    assert taken["epoch"] == lease["epoch"] + 1
    assert await world.engine_pid() == pid
    assert waiting.poll() is None


@pytest.mark.invariant(10)
async def test_a_controller_that_slept_through_its_lease_stops_acting(world: EngineWorld) -> None:
    first = world.start_controller()
    await world.ready()
    pid = await world.engine_pid()
    os.kill(first.pid, signal.SIGSTOP)
    second = world.start_controller()

    async def taken() -> bool:
        (lease,) = await world.rows(tables.leases)
        return int(lease["holder"].split("/")[1]) == second.pid

    await world.until(taken, "the second takes over")
    os.kill(first.pid, signal.SIGCONT)
    one = await world.publish(1)
    await world.ready(one)

    async def yielded() -> bool:
        return "no longer acting" in world.log()

    await world.until(yielded, "the first stops acting")
    assert await world.engine_pid() == pid
    assert await taken()


@pytest.mark.invariant(5)
async def test_no_room_is_said_and_nothing_is_evicted(tmp_path: Path) -> None:
    async with an_engine_world(tmp_path, max_cpu_loras=3) as world:
        one, two = await world.publish(1), await world.publish(2)
        world.start_controller()
        await world.ready(one, two)
        for version in (one, two):
            moves = Promotions(world.database)
            await moves.promote("support", version.name, force=True, reason="test", principal=ANONYMOUS)

        three = await world.publish(3)
        row = await world.settled(three, "refused")

        assert row["code"] == "capacity_exhausted"
        assert "max_cpu_loras" in row["reason"]
        assert set(await loaded(world)) == {one.engine_name, two.engine_name}
        assert (await world.registry.version(three.name)).state is VersionState.VERIFIED


async def test_another_setting_restarts_an_engine_that_runs_without_it(world: EngineWorld) -> None:
    first = world.start_controller()
    before = await world.ready()
    first.terminate()
    first.wait()
    engine = world.settings.engine.model_copy(update={"max_num_seqs": 7})
    world.settings = world.settings.model_copy(update={"engine": engine})

    world.start_controller()
    after = await world.ready(not_epoch=before["epoch"])

    assert after["epoch"] != before["epoch"]
    assert len(world.children()) == 1


async def test_engine_hides_from_its_children_what_is_not_theirs(
    world: EngineWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNOUT_SECRET_OF_TEST", "x")
    world.start_controller()
    await world.ready()

    environment = Path(f"/proc/{await world.engine_pid()}/environ").read_bytes()

    assert b"TURNOUT_SECRET_OF_TEST" not in environment
    assert b"TURNOUT_HOME" not in environment
    assert b"TURNOUT_CHILD" in environment


@pytest.mark.invariant(9)
async def test_the_engine_listens_where_only_its_owner_can_reach_it(world: EngineWorld) -> None:
    world.start_controller()
    await world.ready()

    assert world.socket().parent.stat().st_mode & 0o777 == 0o700
    assert psutil.Process(await world.engine_pid()).net_connections("inet") == []


async def test_wrong_settings_end_the_controller_with_a_sentence(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "gateway.controller", "--home", str(tmp_path / "h")],
        env=os.environ | {"TURNOUT_PORT": "nonsense"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert found.returncode == 1
    assert "port" in found.stderr
    assert "Traceback" not in found.stderr


async def test_the_log_of_an_engine_that_runs_on_is_bounded(world: EngineWorld) -> None:
    world.start_controller()
    await world.ready()
    (row,) = [row for row in await world.rows(tables.processes) if row["kind"] == "engine"]
    engine = Child(row["id"], row["kind"], row["pid"], row["started"], row["argv_digest"], row["attempt"])

    path = child_log(world.settings, engine)
    with path.open("ab") as file:
        file.truncate(MAX_LOG_BYTES + 1)

    async def cut() -> bool:
        return path.stat().st_size <= MAX_LOG_BYTES and path.with_name(f"{path.name}.1").exists()

    await world.until(cut, "the controller cuts the engine's log")
    assert Path(f"/proc/{engine.pid}/fd/1").resolve() == path


def test_a_child_writes_where_its_log_is_looked_for(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    job = Child("verify-1.2", "job", 1, 0.0, "", 2)

    assert child_log(settings, job) == attempt_directory(settings, "verify-1", 2) / "log.txt"
    assert str(child_log(settings, Child("engine-0", "engine", 1, 0.0, "", 1))) == engine_spec(settings).log
