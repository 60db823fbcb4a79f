"""A whole server over a home, on the fake engine, and a client of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from gateway.processes import MARK_VARIABLE, home_marker
from gateway.settings import BaseModelSettings, EngineSettings, JobSettings, Settings
from gateway.supervisor import settings_environment

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120  # against hanging


def settings_of(home: Path, base: Path) -> Settings:
    """As whoever made the home had them; the port is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fake = (sys.executable, "-m", "tests.fakes.engine")
    return Settings(
        home=home,
        port=port,
        log_level="warning",
        drain_timeout_s=5,
        base_model=BaseModelSettings(name="tiny", path=base),
        engine=EngineSettings(command=fake, health_interval_s=0.2, max_loras=2),
        jobs=JobSettings(threads=1),
    )


def until(look: Callable[[], Any], what: Callable[[], str]) -> Any:
    """Poll until `look` gives something true."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            found = look()
        except (httpx.HTTPError, OSError):
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


@contextmanager
def serving(settings: Settings, orders: Path) -> Iterator[httpx.Client]:
    """Supervisor, gateway, controller and fake engine; SIGTERM ends them all."""
    output = settings.home.parent / "serve.out"
    with output.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.homes.supervisor", "--home", str(settings.home)],
            env=os.environ | settings_environment(settings) | {"TESTS_ORDERS": str(orders)},
            cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=settings.url, timeout=30, trust_env=False) as client:
            until(
                lambda: process.poll() is not None or client.get("/readyz").status_code == 200,
                lambda: f"ready: {output.read_text()[-4000:]}",
            )
            assert process.poll() is None, output.read_text()[-4000:]
            yield client
        process.terminate()
        assert process.wait(PATIENCE_S) == 0, output.read_text()[-4000:]
    finally:
        _end(process, settings)


def _end(process: subprocess.Popen[bytes], settings: Settings) -> None:
    """Nothing is left, whatever a failed test left."""
    process.kill()
    process.wait()
    mark = f"{MARK_VARIABLE}={home_marker(settings.home)}:".encode()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                os.kill(int(entry.name), 9)
        except OSError:
            continue


def printed_key(settings: Settings) -> str:
    """The first admin key: it is shown once, on the first start."""
    words = (settings.home.parent / "serve.out").read_text(errors="replace").split()
    return next(word.strip("\"',") for word in words if word.strip("\"',").startswith("tn-"))


def answer_of(answer: httpx.Response) -> Any:
    """The body of a success."""
    assert answer.is_success, f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text}"
    return json.loads(answer.content)
