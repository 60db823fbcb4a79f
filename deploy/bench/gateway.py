"""What the gateway costs: CPU time of its process for each request and each stream, and the share of vLLM's speed it keeps.

    python -m deploy.bench.gateway                 the gateway alone, over an upstream that costs nothing
    python -m deploy.bench.gateway --with-engine   also through it and directly on a real engine, in turns

Writes build/bench/gateway.json. CPU time is user + system of the gateway's process, divided by requests; the median of
several rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import psutil

from deploy.demo.report import Row, write_report

from .load import Load, request_bytes

REPORT = Path("build/bench/gateway.json")
BASE_NAME = "smollm2-135m"
BASE_PATH = Path("build/models/smollm2-135m-instruct")
ROUNDS = 5
CONNECTIONS = 16
REQUESTS = 4_000
STREAMS = 600
ENGINE_CONCURRENCY = 8
ENGINE_REQUESTS = 32
ENGINE_ROUNDS = 4
ENGINE_TOKENS = 64
START_TIMEOUT_S = 60.0
ENGINE_START_TIMEOUT_S = 300.0
_WHOLE_END = b'"total_tokens":84}}'
_STREAM_END = b"0\r\n\r\n"


@dataclass(frozen=True)
class Running:
    """A gateway that serves, and the key to it."""

    pid: int
    port: int
    key: str

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"


def main() -> None:
    """Measure, write the report, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--with-engine", action="store_true", help="also measure against a real vLLM (one to two minutes more)"
    )
    parser.add_argument("--report", type=Path, default=REPORT)
    arguments = parser.parse_args()
    rows = measure_overhead()
    if arguments.with_engine:
        rows.append(measure_engine())
    write_report(arguments.report, rows)
    for row in rows:
        verdict = {True: "holds", False: "MISSED", None: ""}[row.holds]
        sys.stdout.write(f"{row.metric:24} {row.value:>10} {row.unit:8} {row.target or '':10} {verdict}\n")
    sys.stdout.write(f"written to {arguments.report}\n")


def measure_overhead() -> list[Row]:
    """Costs of the gateway alone."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="turnout-bench-")))
        engine_socket = home / "upstream.sock"
        stack.enter_context(
            running_process([sys.executable, "-m", "deploy.bench.upstream", str(engine_socket)], home / "upstream.log")
        )
        wait_for_socket(engine_socket, START_TIMEOUT_S)
        gateway = stack.enter_context(gateway_over(home, engine_socket))
        chat = {
            "model": BASE_NAME,
            "messages": [{"role": "user", "content": "x" * 200}],
            "max_tokens": 64,
            "temperature": 0,
        }
        whole = request_bytes("/v1/chat/completions", chat, gateway.key)
        streamed = request_bytes("/v1/chat/completions", {**chat, "stream": True}, gateway.key)
        per_request = _rounds(gateway, whole, _WHOLE_END, REQUESTS)
        per_stream = _rounds(gateway, streamed, _STREAM_END, STREAMS)
    return [
        Row("us_per_request", round(per_request, 1), "CPU-µs", "<= 150", per_request <= 150),
        Row("us_per_stream", round(per_stream, 1), "CPU-µs", None, None),
    ]


def _rounds(gateway: Running, request: bytes, ending: bytes, total: int) -> float:
    """CPU-µs for each request: the median over rounds, after one that warms up."""
    process = psutil.Process(gateway.pid)
    costs = []
    for round_number in range(ROUNDS + 1):
        before = process.cpu_times()
        asyncio.run(_load(gateway.port, request, ending, total))
        after = process.cpu_times()
        if round_number:
            costs.append((after.user + after.system - before.user - before.system) / total * 1e6)
    return statistics.median(costs)


async def _load(port: int, request: bytes, ending: bytes, total: int) -> None:
    await Load(total).run("127.0.0.1", port, request, ending, connections=CONNECTIONS)


def measure_engine() -> Row:
    """Tokens a second through the gateway, over tokens a second on the engine's own socket, in turns."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="turnout-bench-")))
        engine_socket = home / "engine.sock"
        argv = [
            sys.executable, "-m", "deploy.engine.launch", "--uds", str(engine_socket), "--model", str(BASE_PATH),
            "--served-model-name", BASE_NAME, "--max-model-len", "2048", "--dtype", "bfloat16", "--max-num-seqs", "32",
        ]  # fmt: skip
        stack.enter_context(running_process(argv, home / "engine.log"))
        _wait_for_health(engine_socket, home / "engine.log")
        gateway = stack.enter_context(gateway_over(home, engine_socket))
        ratio = asyncio.run(_ratio(gateway, engine_socket))
    return Row("vllm_tokens_ratio_c8", round(ratio, 4), "ratio", ">= 0.97", ratio >= 0.97)


async def _ratio(gateway: Running, engine_socket: Path) -> float:
    headers = {"authorization": f"Bearer {gateway.key}"}
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(engine_socket))) as direct,
        aiohttp.ClientSession(headers=headers) as through,
    ):
        ways = {"direct": (direct, "http://engine"), "through": (through, gateway.url)}
        for session, url in ways.values():
            await _tokens_per_s(session, url, seed=0)
        ratios = []
        for turn in range(1, ENGINE_ROUNDS + 1):
            order = ["direct", "through"] if turn % 2 else ["through", "direct"]
            rates = {way: await _tokens_per_s(*ways[way], seed=turn) for way in order}
            ratios.append(rates["through"] / rates["direct"])
    return statistics.median(ratios)


async def _tokens_per_s(session: aiohttp.ClientSession, url: str, *, seed: int) -> float:
    """Generated tokens a second, `ENGINE_CONCURRENCY` requests at a time."""
    numbers = iter(range(ENGINE_REQUESTS))
    started = time.perf_counter()
    counts = await asyncio.gather(*(_worker(session, url, numbers, seed) for _ in range(ENGINE_CONCURRENCY)))
    return sum(counts) / (time.perf_counter() - started)


async def _worker(session: aiohttp.ClientSession, url: str, numbers: Iterator[int], seed: int) -> int:
    tokens = 0
    for number in numbers:
        body: dict[str, Any] = {
            "model": BASE_NAME, "prompt": f"Story {number}: once upon a time there was", "max_tokens": ENGINE_TOKENS,
            "temperature": 1.0, "seed": seed * 1000 + number,
        }  # fmt: skip
        async with session.post(f"{url}/v1/completions", json=body) as response:
            answer = await response.json()
            if response.status != httpx.codes.OK:
                raise RuntimeError(f"{url} answered {response.status}: {answer}")
            tokens += int(answer["usage"]["completion_tokens"])
    return tokens


# ---- Processes -----------------------------------------------------------------------------------------------------


@contextmanager
def gateway_over(home: Path, engine_socket: Path) -> Iterator[Running]:
    """A gateway with keys over one replica that is READY, as its controller would have recorded it."""
    port = _free_port()
    environment = {
        **os.environ, "TURNOUT_PORT": str(port), "TURNOUT_AUTH": "keys", "TURNOUT_BASE_MODEL__NAME": BASE_NAME,
        "TURNOUT_BASE_MODEL__PATH": str(BASE_PATH.resolve()), "TURNOUT_LOG_LEVEL": "warning",
    }  # fmt: skip
    log = home / "gateway.log"
    argv = [sys.executable, "-m", "gateway.app", "--home", str(home / "home")]
    with running_process(argv, log, environment) as process:
        _wait_until(lambda: _alive(port), START_TIMEOUT_S, f"the gateway did not start: {log}")
        found = re.search(r"tn-[A-Za-z0-9_-]{43}", log.read_text())
        if found is None:
            raise RuntimeError(f"the gateway printed no admin key: {log.read_text()}")
        _record_replica(home / "home" / "turnout.db", engine_socket)
        _wait_until(lambda: _ready(port), START_TIMEOUT_S, "the gateway did not see the engine")
        yield Running(process.pid, port, found[0])


def _record_replica(database: Path, engine_socket: Path) -> None:
    with sqlite3.connect(database, timeout=10) as connection:
        connection.execute(
            "INSERT INTO replicas (id, state, socket, epoch, self_test, revision) VALUES ('bench', 'ready', ?, '1', 'passed', 1)",
            (str(engine_socket),),
        )
        connection.execute("UPDATE revisions SET value = value + 1 WHERE name = 'routing'")
    connection.close()


@contextmanager
def running_process(
    argv: list[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, ended with the block."""
    with log.open("wb") as file:
        process = subprocess.Popen(argv, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _alive(port: int) -> bool:
    return _answers(f"http://127.0.0.1:{port}/healthz")


def _ready(port: int) -> bool:
    return _answers(f"http://127.0.0.1:{port}/readyz")


def _answers(url: str, transport: httpx.BaseTransport | None = None) -> bool:
    try:
        with httpx.Client(transport=transport, trust_env=False, timeout=5) as client:
            return client.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def wait_for_socket(path: Path, timeout_s: float) -> None:
    """Wait until something listens there."""
    _wait_until(path.exists, timeout_s, f"nothing listens on {path}")


def _wait_for_health(engine_socket: Path, log: Path) -> None:
    def healthy() -> bool:
        return engine_socket.exists() and _answers("http://engine/health", httpx.HTTPTransport(uds=str(engine_socket)))

    _wait_until(
        healthy, ENGINE_START_TIMEOUT_S, f"the engine did not start: {log.read_text()[-2000:] if log.exists() else ''}"
    )


def _wait_until(condition: Any, timeout_s: float, failure: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(failure)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
