"""A gateway of its own process under the requests that are made to stop it: memory stays bounded, nobody is lost."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.bench.attacks import Attack, attacks
from deploy.bench.door import AT_ONCE, MAX_CROWD_GROWTH_MIB, MAX_GROWTH_MIB, keys_of, send, together, watched
from deploy.bench.gateway import Running
from tests.corpus import make_base
from tests.fakes.stack import BASE
from tests.integration.test_gateway_start import free_port

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("8mib_of_text", "8mib_with_an_emoji", "8mib_of_strings", "8mib_of_fewer_objects", "upload_of_returns")


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Running]:
    make_base(tmp_path / "base", name=BASE)
    port, log = free_port(), tmp_path / "gateway.log"
    environment = {
        **os.environ, "TURNOUT_PORT": str(port), "TURNOUT_AUTH": "keys", "TURNOUT_BASE_MODEL__NAME": BASE,
        "TURNOUT_BASE_MODEL__PATH": str(tmp_path / "base"), "TURNOUT_LOG_LEVEL": "error",
    }  # fmt: skip
    with log.open("wb") as file:
        argv = [sys.executable, "-m", "gateway.app", "--home", str(tmp_path / "home")]
        process = subprocess.Popen(argv, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        wait_until(lambda: is_alive(port))
        found = re.search(r"tn-[A-Za-z0-9_-]{43}", log.read_text())
        assert found is not None
        yield Running(process.pid, port, found[0])
    finally:
        process.kill()
        process.wait()


def is_alive(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def named(*names: str) -> list[Attack]:
    return [attack for attack in attacks(BASE) if attack.name in names]


def test_no_request_takes_more_memory_than_one_may(gateway: Running) -> None:
    keys = keys_of(gateway)
    grown = {}
    for attack in attacks(BASE):
        with watched(gateway) as seen:
            status = send(gateway, attack, keys)
        grown[attack.name] = (status, round(seen.growth_mib))

    assert {name: found for name, found in grown.items() if found[1] > MAX_GROWTH_MIB} == {}
    # There is no engine here: what is sound gets as far as that.
    assert {status for status, _ in grown.values()} <= {200, 400, 403, 404, 413, 414, 422, 431, 503}
    assert grown["8mib_of_text"][0] == 503


def test_many_of_the_heaviest_at_once_take_bounded_memory_and_are_all_answered(gateway: Running) -> None:
    keys = keys_of(gateway)

    seen = together(gateway, named(*HEAVY), keys)

    assert len(seen.statuses) == AT_ONCE
    assert set(seen.statuses) <= {200, 400, 503}
    assert seen.growth_mib <= MAX_CROWD_GROWTH_MIB
    assert is_alive(gateway.port)


def test_a_gateway_that_is_killed_leaves_no_reader(gateway: Running) -> None:
    send(gateway, named("8mib_of_text")[0], keys_of(gateway))
    (reader,) = psutil.Process(gateway.pid).children(recursive=True)

    os.kill(gateway.pid, signal.SIGKILL)

    wait_until(lambda: not reader.is_running() or reader.status() == psutil.STATUS_ZOMBIE)
