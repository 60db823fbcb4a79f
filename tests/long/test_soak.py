"""Minutes of everything that clients do, good and bad: memory, descriptors and tasks stay, and no answer is wrong."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from .clients import Clients
from .served import Served, a_server

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]

SOAK_S = float(os.environ.get("TURNOUT_SOAK_S", "300"))
SEED = int(os.environ.get("TURNOUT_SIMULATION_SEED", "1"))
CONCURRENCY = 16
WARM_UP_S = 10.0  # pools of connections fill up
SETTLED_SHARE = 0.25  # of the soak: memory that the first requests of every kind take is no leak
MAX_GROWTH = 0.10
MAX_MORE_DESCRIPTORS = 8  # the pool of database connections fills up slowly: two files each
MAX_BYTES_PER_EXPOSURE = 1_500
_EVERY_S = 1.0
_BAD: tuple[tuple[Any, int], ...] = (
    ({"model": "nobody"}, 400),
    ({"model": "nobody", "messages": [{"role": "user", "content": "x"}]}, 404),
    ({"messages": [{"role": "user", "content": "x"}]}, 400),
    ({"model": "tiny", "messages": "x"}, 400),
    ({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "prompt_logprobs": 1}, 400),
    ({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "n": 10_000}, 400),
    ([1, 2, 3], 400),
)


class SoakClients(Clients):
    """Besides good requests those that break off, and those that are none."""

    async def leave(self) -> None:
        """A stream whose reader goes away in the middle."""
        url = f"{self.served.settings.url}/v1/chat/completions"
        model = self.any_model()
        async with self.served.http.post(url, json=self.body(model, stream=True)) as answer:
            self.note_status(answer.status, model)
            await answer.content.readline()
            answer.close()
        self.statuses["left"] += 1

    async def err(self) -> None:
        """A request that must be refused, with the status that it must be refused with."""
        body, expected = self.random.choice(_BAD)
        url = f"{self.served.settings.url}/v1/chat/completions"
        async with self.served.http.post(url, json=body) as answer:
            self.statuses["refused"] += 1
            if answer.status != expected:
                self.wrong.append(f"{body} was answered with {answer.status} {await answer.text()}")

    async def look(self) -> None:
        """What dashboards and clients read."""
        for path in ("/v1/models", "/api/routes", "/readyz"):
            status, _ = await self.served.get(path)
            if status != 200:
                self.wrong.append(f"{path} was answered with {status}")
        await asyncio.sleep(_EVERY_S)

    async def anything(self) -> None:
        """One client's next request."""
        await self.random.choices([self.stream, self.ask, self.leave, self.err], [55, 15, 15, 15])[0]()

    async def move_now_and_then(self) -> None:
        await asyncio.sleep(self.random.uniform(1, 3))
        await self.move()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with a_server(tmp_path) as server:
        yield server


@pytest.mark.invariant(2)
async def test_it_stays_as_it_was_however_long_it_is_used(served: Served) -> None:
    clients = SoakClients(served, random.Random(SEED), max_versions=8)
    await _prepare(served, clients)
    await _load(served, clients, WARM_UP_S)
    before = _resources(served)
    size_before, exposures_before = _stored(served)

    seen = await _load(served, clients, SOAK_S)
    after = _resources(served)
    size_after, exposures_after = _stored(served)

    warm, last = _rss(seen, SETTLED_SHARE), _rss(seen, 0.9)
    growth = last / warm - 1
    asked = exposures_after - exposures_before
    stored = (size_after - size_before) / max(1, asked)
    told = (
        f"seed {SEED}: RSS {warm / 2**20:.1f} -> {last / 2**20:.1f} MiB ({growth:+.1%}); idle {before} -> {after}; "
        f"{asked} exposures, {stored:.0f} bytes each; {dict(clients.statuses)}, {len(clients.moves)} moves"
    )
    print(told)  # noqa: T201
    assert clients.wrong == [], told
    assert not [status for status in clients.statuses if status[-3:].startswith("5")], told
    assert growth <= MAX_GROWTH, told
    assert after["descriptors"] <= before["descriptors"] + MAX_MORE_DESCRIPTORS, told
    assert after["tasks"] <= before["tasks"], told
    assert stored <= MAX_BYTES_PER_EXPOSURE, told
    assert "Traceback" not in served.output.read_text()
    assert await served.stop() == 0


async def _prepare(served: Served, clients: SoakClients) -> None:
    """Versions of both adapters are ready, and nothing is published any more."""
    clients.start(clients.publish)
    await served.until(clients.has_both, "both adapters have a version")
    await clients.stop()

    async def all_ready() -> bool:
        """In the tables, and in the gateway's copy of them, which follows a moment later."""
        clients.look_for_ready()
        _, replicas = await served.get("/api/replicas")
        told = {name for replica in replicas for name in replica["ready_adapters"]}
        return {*clients.ready} == {*clients.published} and len(told) == len(clients.published)

    await served.until(all_ready, "all versions are loaded")


async def _idle(served: Served) -> None:
    """Nothing is asked, nothing waits to be stored, and connections that nobody needs are closed."""
    seen: list[int] = []

    async def is_idle() -> bool:
        told = served.told()
        gateway = served.part("gateway")
        if told["in_flight"] or told["queued"] or gateway is None:
            return False
        seen.append(psutil.Process(gateway).num_fds())
        steady = seen[-60:]  # three seconds
        return len(steady) == 60 and max(steady) == min(steady)

    await served.until(is_idle, "idle", 90)


def _resources(served: Served) -> dict[str, int]:
    gateway = served.part("gateway")
    assert gateway is not None
    return {"descriptors": psutil.Process(gateway).num_fds(), "tasks": served.told()["tasks"]}


def _stored(served: Served) -> tuple[int, int]:
    [row] = served.rows("SELECT count(*) AS count FROM exposures")
    return (served.settings.home / "turnout.db").stat().st_size, int(row["count"])


async def _load(served: Served, clients: SoakClients, for_s: float) -> list[int]:
    """All clients for a while, and then none until nothing moves; the gateway's memory, second by second."""
    gateway = served.part("gateway")
    assert gateway is not None
    process, until = psutil.Process(gateway), time.monotonic() + for_s
    seen: list[int] = []
    clients.start(*[clients.anything] * CONCURRENCY, clients.look, clients.move_now_and_then)
    while time.monotonic() < until and not clients.wrong:
        seen.append(process.memory_info().rss)
        await asyncio.sleep(_EVERY_S)
    await clients.stop()
    await _idle(served)
    return seen


def _rss(seen: list[int], after: float) -> float:
    """The middle of the tenth of all looks that comes after this share of them."""
    first = int(len(seen) * after)
    return statistics.median(seen[first : first + max(1, len(seen) // 10)])
