"""How long a rollback takes as clients see it, under load: over an upstream that costs nothing.

    python -m deploy.bench.rollouts

`rollback_ms` is the time from the call until the last request was *sent* that the old version answered; 0 when none was
sent after the call. Writes build/bench/rollouts.json.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from deploy.demo.report import Row, write_report

from .gateway import BASE_NAME, START_TIMEOUT_S, Running, gateway_over, running_process, wait_for_socket

REPORT = Path("build/bench/rollouts.json")
ROLLBACKS = 50
WORKERS = 8
PAUSE_S = 0.03  # between a client's requests: about 200 a second, far from what the gateway can do
MIN_LOAD = 100.0  # requests a second
SETTLED = 20  # answers that are waited for before and after each move
DIGESTS = ("1" * 64, "2" * 64)
OLD, NEW = "support@2", "support@1"  # a rollback leaves the one and returns to the other
_AT = "2026-01-01 00:00:00.000000"
_NEVER = "9999-01-01 00:00:00.000000"


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer: when it was asked for, and by which version it was given."""

    sent_at: float
    version: str


@dataclass
class Traffic:
    """Requests at a steady rate, from several clients."""

    running: Running
    seen: list[Seen] = field(default_factory=list)
    failed: int = 0
    _came: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def flowing(self, session: aiohttp.ClientSession) -> AsyncIterator[None]:
        """Requests flow inside the block."""
        workers = [asyncio.create_task(self._work(session, number)) for number in range(WORKERS)]
        try:
            yield
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _work(self, session: aiohttp.ClientSession, number: int) -> None:
        body = {"model": "support", "messages": [{"role": "user", "content": "x" * 200}], "user": f"u{number}"}
        while True:
            sent_at = time.perf_counter()
            async with session.post(f"{self.running.url}/v1/chat/completions", json=body) as answer:
                await answer.read()
                self.failed += answer.status != 200
                self.seen.append(Seen(sent_at, answer.headers.get("x-turnout-version", "")))
                self._came.set()
            await asyncio.sleep(PAUSE_S)

    async def until(self, is_there: Callable[[], bool]) -> None:
        """Wait for a condition that only more answers can bring about."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while not is_there():
                self._came.clear()
                await self._came.wait()


@dataclass(frozen=True, slots=True)
class Rollback:
    """One rollback from outside; milliseconds since the call."""

    call_ms: float
    last_old_ms: float
    late: int  # answers of the old version to requests that were sent after the call had ended


def main() -> None:
    """Measure, write the report, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollbacks", type=int, default=ROLLBACKS)
    parser.add_argument("--report", type=Path, default=REPORT)
    arguments = parser.parse_args()
    rows = measure(arguments.rollbacks)
    write_report(arguments.report, rows)
    for row in rows:
        verdict = {True: "holds", False: "MISSED", None: ""}[row.holds]
        sys.stdout.write(f"{row.metric:28} {row.value:>10} {row.unit:12} {row.target or '':10} {verdict}\n")
    sys.stdout.write(f"written to {arguments.report}\n")


def measure(rollbacks: int) -> list[Row]:
    """Start the stack, move traffic back and forth, and judge."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="turnout-bench-")))
        engine_socket = home / "upstream.sock"
        argv = [sys.executable, "-m", "deploy.bench.upstream", str(engine_socket)]
        stack.enter_context(running_process(argv, home / "upstream.log"))
        wait_for_socket(engine_socket, START_TIMEOUT_S)
        running = stack.enter_context(gateway_over(home, engine_socket))
        _record_versions(home / "home" / "turnout.db")
        traffic, moves, rate = asyncio.run(_moves(running, rollbacks))
    return rows_of(traffic, moves, rate)


def rows_of(traffic: Traffic, moves: Sequence[Rollback], rate: float) -> list[Row]:
    """The figures."""
    last_old, calls = [move.last_old_ms for move in moves], [move.call_ms for move in moves]
    late = sum(move.late for move in moves)
    return [
        Row("rollbacks", len(moves), "moves", ">= 20", len(moves) >= 20),
        Row("requests_per_s", round(rate, 0), "requests/s", f">= {MIN_LOAD:.0f}", rate >= MIN_LOAD),
        *(Row(f"rollback_ms_{name}", value, "ms", None, None) for name, value in _spread(last_old).items()),
        *(Row(f"rollback_call_ms_{name}", value, "ms", None, None) for name, value in _spread(calls).items()),
        Row("late_answers", late, "answers", "<= 0", late == 0),
        Row("failed_requests", traffic.failed, "requests", "<= 0", traffic.failed == 0),
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    found = {"p50": statistics.median(ordered), "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}
    return {name: round(value, 2) for name, value in (found | {"max": ordered[-1]}).items()}


async def _moves(running: Running, rollbacks: int) -> tuple[Traffic, list[Rollback], float]:
    traffic = Traffic(running)
    headers = {"authorization": f"Bearer {running.key}"}
    async with aiohttp.ClientSession(headers=headers) as session, aiohttp.ClientSession(headers=headers) as mover:
        await _post(mover, running, "promote", target=NEW)
        async with traffic.flowing(session):
            began, before = time.perf_counter(), len(traffic.seen)
            moves = [await _one(traffic, mover, running) for _ in range(rollbacks)]
            rate = (len(traffic.seen) - before) / (time.perf_counter() - began)
    return traffic, moves, rate


async def _one(traffic: Traffic, mover: aiohttp.ClientSession, running: Running) -> Rollback:
    """Promote, wait until it answers, roll back, wait until the way back answers."""
    await _post(mover, running, "promote", target=OLD)
    first = len(traffic.seen)
    await traffic.until(lambda: sum(one.version == OLD for one in traffic.seen[first:]) >= SETTLED)
    started = time.perf_counter()
    await _post(mover, running, "rollback")
    ended = time.perf_counter()
    await traffic.until(lambda: sum(one.sent_at > ended for one in traffic.seen[first:]) >= SETTLED)
    old = [one.sent_at for one in traffic.seen[first:] if one.version == OLD]
    last_old = max((sent_at for sent_at in old if sent_at >= started), default=started)
    return Rollback((ended - started) * 1000, (last_old - started) * 1000, sum(sent_at > ended for sent_at in old))


async def _post(mover: aiohttp.ClientSession, running: Running, what: str, **body: Any) -> None:
    body |= {"force": True, "reason": "benchmark"}
    async with mover.post(f"{running.url}/api/routes/support/{what}", json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{what} came to {answer.status}: {await answer.text()}")


def _record_versions(database: Path) -> None:
    """Two verified versions that the replica has loaded, and their route, as registry and controller would have left them."""
    owned = ("proj_default", _AT, "bench")
    with sqlite3.connect(database, timeout=10) as connection:
        for number, digest in enumerate(DIGESTS, start=1):
            connection.execute(
                "INSERT INTO adapter_versions (id, project_id, created_at, created_by, adapter, version, digest, manifest_digest,"
                " base_model, base_digest, rank, size_bytes, state) VALUES (?, ?, ?, ?, 'support', ?, ?, ?, ?, ?, 8, 1, 'verified')",
                (f"ver-{number}", *owned, number, digest, digest, BASE_NAME, "b" * 64),
            )
            connection.execute(
                "INSERT INTO residency (replica_id, engine_name, state, updated_at) VALUES ('bench', ?, 'ready', ?)",
                (f"support.v{number}.{digest[:12]}", _AT),
            )
        connection.execute(
            "INSERT INTO routes (name, project_id, created_at, created_by, revision, salt, stable, previous, variants, gates,"
            " updated_at, updated_by) VALUES ('support', ?, ?, ?, 1, 'salt', ?, ?, ?, '[]', ?, 'bench')",
            (*owned, BASE_NAME, BASE_NAME, f'[{{"target": "{BASE_NAME}", "weight": 100}}]', _AT),
        )
        # What is said of engines is believed while a controller lives; here there is none, and nothing that it would change.
        connection.execute(
            "INSERT INTO leases (name, holder, expires_at, epoch) VALUES ('controller', 'bench', ?, 1)", (_NEVER,)
        )
        connection.execute("UPDATE revisions SET value = value + 1 WHERE name = 'routing'")
    connection.close()


if __name__ == "__main__":
    main()
