"""kill -9 of a random process at a random moment, under work that never stops; and that no acknowledged write is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gateway.processes import MARK_VARIABLE, home_marker

from . import clients as module
from .clients import CHUNKS, Clients
from .served import Broken, Served, a_server

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]

ROUNDS = int(os.environ.get("TURNOUT_KILL_ROUNDS", "40"))
SEED = int(os.environ.get("TURNOUT_SIMULATION_SEED", "1"))
VICTIMS = (("gateway",), ("controller",), ("engine",), ("gateway", "engine"), ("controller", "engine"))
SERVES_WITHIN_S = 20.0


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with a_server(tmp_path) as server:
        yield server


@pytest.mark.invariant(2)
@pytest.mark.invariant(5)
@pytest.mark.invariant(10)
async def test_killed_at_any_moment_it_serves_again_and_has_lost_nothing(served: Served) -> None:
    choose = random.Random(SEED)
    clients = Clients(served, random.Random(SEED + 1))
    took: dict[str, list[float]] = {}
    clients.start(*[clients.stream] * 4, *[clients.ask] * 2, clients.publish)
    await served.until(clients.has_both, "both adapters have a version")
    clients.start(clients.move)

    for number in range(ROUNDS):
        victims = choose.choices(VICTIMS, [30, 25, 25, 10, 10])[0]
        if choose.random() < 0.5:
            await asyncio.wait_for(clients.publishing.wait(), 20)
        await asyncio.sleep(choose.uniform(0, 1.5) ** 4 / 4)  # the random moment, mostly an early one
        try:
            took.setdefault("+".join(victims), []).append(await _kill(served, clients, victims))
            async with clients.quiet:
                await clients.check_swept()
                clients.check()
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}, round {number}, {victims} killed: {error}") from None
        clients.look_for_ready()

    await clients.stop()
    clients.check()
    assert await served.stop() == 0
    assert served.leftovers() == []
    assert "Traceback" not in served.output.read_text()
    longest = {name: f"{len(all_of)} kills, at most {max(all_of):.1f} s" for name, all_of in took.items()}
    print(f"seed {SEED}: {longest}; {len(clients.published)} versions, {len(clients.moves)} moves; {clients.statuses}")  # noqa: T201


def _lose_a_version(clients: Clients) -> None:
    clients.published["support@99"] = "f" * 64


def _lose_a_move(clients: Clients) -> None:
    clients.moves.append({"route": "support", "revision": 999, "stable": "support@1"})


def _damage_a_file(clients: Clients) -> None:
    weights = next(clients.served.settings.artifacts_dir.glob("??/*/adapter_model.safetensors"))
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1])


def _start_a_second_engine(clients: Clients) -> None:
    mark = f"{home_marker(clients.served.settings.home)}:engine-0:99"
    subprocess.Popen(["sleep", "60"], env={"PATH": os.environ["PATH"], MARK_VARIABLE: mark}).returncode = 0


LOSSES: dict[str, Callable[[Clients], None]] = {
    "which was acknowledged, is": _lose_a_version,
    "is not in the audit log": _lose_a_move,
    "are damaged or gone": _damage_a_file,
    "engines: ": _start_a_second_engine,
}


@pytest.mark.mutant(10)
async def test_what_is_lost_or_left_would_be_seen(served: Served) -> None:
    clients = Clients(served, random.Random(SEED))
    clients.start(clients.publish)
    await served.until(clients.has_both, "both adapters have a version")
    clients.start(clients.move)
    await served.until(lambda: _has_promoted(clients), "something was promoted")
    async with clients.quiet:
        await clients.stop()
    clients.check()

    for words, lose in LOSSES.items():
        lose(clients)
        with pytest.raises(Broken, match=words):
            clients.check()


@pytest.mark.mutant(10)
@pytest.mark.parametrize(
    "left", ["artifacts/.staging/left", "snapshot.json.4711.tmp", "references/abc.json.4711-ab.tmp"]
)
async def test_what_is_half_written_would_be_seen(served: Served, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    monkeypatch.setattr(module, "SWEPT_WITHIN_S", 0.3)
    clients = Clients(served, random.Random(SEED))
    await clients.check_swept()

    (served.settings.home / left).mkdir(parents=True)

    with pytest.raises(Broken, match=left):
        await clients.check_swept()


@pytest.mark.mutant(2)
def test_an_answer_by_another_or_a_false_end_would_be_seen(served: Served) -> None:
    def chunk(content: str) -> bytes:
        return json.dumps({"choices": [{"delta": {"content": content}}]}).encode()

    whole = [chunk(token) for token in ("support.v1.abc", "|", *"x" * (CHUNKS - 2))]
    for identity, events, wrong in [
        ("support.v1.abc", [*whole, b"[DONE]"], 0),
        ("support.v1.abc", whole[:1], 0),
        ("support.v2.abc", whole[:1], 1),
        ("support.v1.abc", [*whole[:-1], b"[DONE]"], 1),
    ]:
        clients = Clients(served, random.Random(SEED))
        clients.check_stream(identity, events)
        assert len(clients.wrong) == wrong


async def _has_promoted(clients: Clients) -> bool:
    return clients.statuses["promote 200"] > 0


async def _kill(served: Served, clients: Clients, victims: tuple[str, ...]) -> float:
    """Until other processes serve everything that was served before; how long that took."""
    before = {name: served.part(name) for name in victims}
    for pid in before.values():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    started = time.monotonic()

    async def serves() -> bool:
        if any(served.part(name) in (None, pid) for name, pid in before.items()):
            return False
        for model in ("support", "billing", served.base.name, *clients.ready):
            status, _ = await served.post("/v1/chat/completions", **clients.body(model))
            if status != 200:
                return False
        return await served.is_ready()

    await served.until(serves, "serves again", SERVES_WITHIN_S)
    return time.monotonic() - started
