"""What one hostile request costs everybody else: how long they wait meanwhile, and the memory that it takes.

    python -m deploy.bench.door

Writes build/bench/door.json. A probe asks for `/healthz` every two milliseconds; its longest wait is what the request
held the loop for, with the machine's own noise on top (the row `ms_idle`). Memory is that of the gateway and its
children, at its highest over what it was before.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from deploy.demo.report import Row, write_report

from .attacks import Attack, Who, attacks
from .gateway import BASE_NAME, START_TIMEOUT_S, Running, gateway_over, running_process, wait_for_socket

REPORT = Path("build/bench/door.json")
AT_ONCE = 50
MAX_HOLD_MS = 20.0
MAX_GROWTH_MIB = 64.0
MAX_CROWD_GROWTH_MIB = 256.0
MAX_P99_MS = 100.0
_PROBE_EVERY_S = 0.002
_RSS_EVERY_S = 0.01
_ATTACK_TIMEOUT_S = 60.0
_SETTLE_S = 0.3
_ROUNDS = 3
_WORST = 3


@dataclass
class Seen:
    """What a probe saw while something else went on."""

    waits_ms: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)

    @property
    def longest_ms(self) -> float:
        """The longest wait."""
        return max(self.waits_ms)

    @property
    def p99_ms(self) -> float:
        """What 99 of 100 waits stayed below."""
        return statistics.quantiles(self.waits_ms, n=100)[98]

    @property
    def growth_mib(self) -> float:
        """Memory at its highest, over what it was."""
        return max(self.rss_mib) - self.rss_mib[0]


def main() -> None:
    """Measure, write the report, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--only", help="attacks whose name holds this")
    arguments = parser.parse_args()
    rows = measure(arguments.only or "")
    write_report(arguments.report, rows)
    for row in rows:
        verdict = {True: "holds", False: "MISSED", None: ""}[row.holds]
        sys.stdout.write(f"{row.metric:40} {row.value:>10} {row.unit:6} {row.target or '':10} {verdict}\n")
    sys.stdout.write(f"written to {arguments.report}\n")


def measure(only: str) -> list[Row]:
    """Each attack alone, then the worst of them many at a time."""
    chosen = [attack for attack in attacks(BASE_NAME) if only in attack.name]
    with _serving() as (gateway, keys):
        send(gateway, attacks(BASE_NAME)[0], keys)  # what is started once is started now
        with watched(gateway) as idle:
            time.sleep(1.0)
        rows = [Row("ms_idle", round(idle.longest_ms, 1), "ms", None, None)]
        holds: dict[str, float] = {}
        grows: dict[str, float] = {}
        for attack in chosen:
            alone = _alone(gateway, attack, keys)
            holds[attack.name], grows[attack.name] = alone.longest_ms, alone.growth_mib
            rows += [
                _row(f"ms_{attack.name}", alone.longest_ms, "ms", MAX_HOLD_MS),
                _row(f"mib_{attack.name}", alone.growth_mib, "MiB", MAX_GROWTH_MIB),
            ]
        worst = sorted(chosen, key=lambda attack: -holds[attack.name])[:_WORST]
        heaviest = sorted(chosen, key=lambda attack: -grows[attack.name])[:_WORST]
        crowd = together(gateway, [*worst, *heaviest], keys)
    return [
        *rows,
        _row(f"p99_ms_{AT_ONCE}_at_once", crowd.p99_ms, "ms", MAX_P99_MS),
        _row(f"mib_{AT_ONCE}_at_once", crowd.growth_mib, "MiB", MAX_CROWD_GROWTH_MIB),
    ]


def _row(metric: str, value: float, unit: str, target: float) -> Row:
    return Row(metric, round(value, 1), unit, f"<= {target:g}", value <= target)


def _alone(gateway: Running, attack: Attack, keys: dict[Who, str]) -> Seen:
    """The attack a few times; of the waits the median of the longest, for noise only adds."""
    longest, seen = [], Seen()
    for _ in range(_ROUNDS):
        with watched(gateway) as round_:
            status = send(gateway, attack, keys)
            time.sleep(_SETTLE_S)
        longest.append(round_.longest_ms)
        seen.rss_mib += round_.rss_mib
    sys.stderr.write(f"{attack.name:28} {status} {[round(ms) for ms in longest]} ms\n")
    seen.waits_ms = [statistics.median(longest)]
    return seen


def together(gateway: Running, worst: list[Attack], keys: dict[Who, str]) -> Seen:
    """Many at a time, of each kind as many."""
    chosen = [worst[number % len(worst)] for number in range(AT_ONCE)]
    with watched(gateway) as seen:
        threads = [
            threading.Thread(target=lambda attack=attack: seen.statuses.append(send(gateway, attack, keys)))
            for attack in chosen
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return seen


@contextmanager
def _serving() -> Iterator[tuple[Running, dict[Who, str]]]:
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="turnout-bench-")))
        upstream = home / "upstream.sock"
        argv = [sys.executable, "-m", "deploy.bench.upstream", str(upstream), BASE_NAME]
        stack.enter_context(running_process(argv, home / "upstream.log"))
        wait_for_socket(upstream, START_TIMEOUT_S)
        gateway = stack.enter_context(gateway_over(home, upstream))
        yield gateway, keys_of(gateway)


def keys_of(gateway: Running) -> dict[Who, str]:
    """A key of each kind, made for this."""
    keys: dict[Who, str] = {"admin": gateway.key, "nobody": "tn-nobody"}
    made: tuple[Who, Who] = ("train", "inference")
    for who in made:
        answer = httpx.post(
            f"{gateway.url}/api/keys",
            json={"name": who, "scopes": [who]},
            headers={"authorization": f"Bearer {gateway.key}"},
            trust_env=False,
        )
        keys[who] = answer.raise_for_status().json()["key"]
    return keys


def send(gateway: Running, attack: Attack, keys: dict[Who, str]) -> int:
    """Send it and wait for the answer; its status, 0 when none came."""
    method = "POST" if attack.body else "GET"
    head = (
        f"{method} {attack.path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {keys[attack.who]}\r\n"
        f"content-type: {attack.content_type}\r\ncontent-length: {len(attack.body)}\r\nconnection: close\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=_ATTACK_TIMEOUT_S) as connection:
        with suppress(OSError):  # an answer may come before all of it is sent
            connection.sendall(head)
            connection.sendall(attack.body)
        with suppress(OSError):
            return int(connection.recv(64).split()[1])
    return 0


@contextmanager
def watched(gateway: Running) -> Iterator[Seen]:
    """Probe and weigh the gateway while the block runs."""
    seen, stop = Seen(), threading.Event()
    watchers = [threading.Thread(target=watch, args=(gateway, seen, stop)) for watch in (_probe, _weigh)]
    for watcher in watchers:
        watcher.start()
    while not (seen.waits_ms and seen.rss_mib):
        time.sleep(_PROBE_EVERY_S)
    try:
        yield seen
    finally:
        stop.set()
        for watcher in watchers:
            watcher.join()


def _probe(gateway: Running, seen: Seen, stop: threading.Event) -> None:
    request = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=_ATTACK_TIMEOUT_S) as connection:
        while not stop.is_set():
            started = time.perf_counter()
            connection.sendall(request)
            connection.recv(4096)
            seen.waits_ms.append((time.perf_counter() - started) * 1000)
            time.sleep(_PROBE_EVERY_S)


def _weigh(gateway: Running, seen: Seen, stop: threading.Event) -> None:
    while not stop.is_set():
        seen.rss_mib.append(_rss_mib(gateway.pid))
        time.sleep(_RSS_EVERY_S)


def _rss_mib(pid: int) -> float:
    total = 0
    leader = psutil.Process(pid)
    for one in (leader, *leader.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total / 2**20


if __name__ == "__main__":
    main()
