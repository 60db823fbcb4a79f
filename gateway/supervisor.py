"""`turnout serve`: runs gateway and controller, starts them again when they die, and ends everything when told to stop.

It holds no state and opens no database while it runs. Killed itself, it takes both with it (the kernel tells them), and
the engine and jobs go on until the next start adopts them.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, Popen
from types import FrameType
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import structlog
from pydantic import BaseModel

from .controller import stop_children
from .errors import Conflict, GatewayError
from .logs import configure_logging
from .settings import Settings, load_settings

log = structlog.get_logger(__name__)

EXIT_FAILED = 1
MAX_BACKOFF_S = 30.0
# A process that ran this long before it died did not die of its start.
STABLE_AFTER_S = 30.0
# Deaths before anything ever answered: the cause is a setting, and starting again will not change it.
MAX_EARLY_DEATHS = 3
CONTROLLER_STOP_S = 20.0
_POLL_S = 0.1
_READY_POLL_S = 0.5
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def backoff_s(deaths: int) -> float:
    """Pause before a start after this many deaths in a row."""
    return 0.0 if deaths == 0 else min(MAX_BACKOFF_S, 0.25 * 2.0 ** min(deaths - 1, 16))


def settings_environment(settings: Settings) -> dict[str, str]:
    """Every setting as variables that give the children the very same ones, whatever file or flag they came from."""
    found = {}
    for name, value in settings:
        if value is None:
            continue
        text = value.model_dump_json() if isinstance(value, BaseModel) else value
        found[f"TURNOUT_{name.upper()}"] = text if isinstance(text, str) else _plain(text)
    return found


def _plain(value: object) -> str:
    return str(value) if isinstance(value, Path) else json.dumps(value)


@contextmanager
def only_one(settings: Settings) -> Iterator[None]:
    """Hold this home's lock. Raises `Conflict` while another supervisor does."""
    settings.prepare_directories()
    path = settings.run_dir / "lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                f"a server already runs over {settings.home}; stop it, or set TURNOUT_HOME to another directory",
                code="already_running",
            ) from error
        yield


@dataclass
class _Part:
    """One of the two processes."""

    module: str
    pid: int = 0
    started_at: float = 0.0
    deaths: int = 0
    start_at: float = 0.0


class Supervisor:
    """Runs both parts until a signal comes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._gateway = _Part("gateway.app")
        self._controller = _Part("gateway.controller")
        self._is_stopping = False
        self._was_up = False
        self._was_ready = False
        self._environment = os.environ | settings_environment(settings)
        self._opener = build_opener(ProxyHandler({}))  # our own address needs no proxy

    def run(self) -> int:
        """Until SIGTERM or SIGINT; the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        # What a dead controller leaves becomes ours, so that somebody reaps it.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        status, next_look = 0, 0.0
        while not self._is_stopping:
            self._start_due()
            self._reap()
            if self._gave_up():
                log.error(
                    "gave up: the server dies as soon as it starts; its last lines say why", deaths=MAX_EARLY_DEATHS
                )
                status = EXIT_FAILED
                break
            if not self._was_ready and time.monotonic() >= next_look:
                self._tell_ready()
                next_look = time.monotonic() + _READY_POLL_S
            time.sleep(_POLL_S)
        self._end()
        return status

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True

    def _gave_up(self) -> bool:
        return not self._was_up and any(part.deaths >= MAX_EARLY_DEATHS for part in (self._gateway, self._controller))

    def _start_due(self) -> None:
        for part in (self._gateway, self._controller):
            if part.pid == 0 and time.monotonic() >= part.start_at:
                self._start(part)

    def _start(self, part: _Part) -> None:
        argv = [sys.executable, "-m", part.module, "--home", str(self._settings.home)]
        # A session of its own: Ctrl-C reaches only us, and we end the parts in the right order.
        process = Popen(
            argv, env=self._environment, stdin=DEVNULL, start_new_session=True, preexec_fn=_die_with(os.getpid())
        )
        process.returncode = 0  # reaped by pid below, with everything else
        part.pid, part.started_at = process.pid, time.monotonic()

    def _reap(self) -> None:
        """Collect everything that ended: the parts, and strangers that a dead controller left to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for part in (self._gateway, self._controller):
                if part.pid == pid:
                    self._note_death(part, os.waitstatus_to_exitcode(status))

    def _note_death(self, part: _Part, code: int) -> None:
        part.pid = 0
        if self._is_stopping:
            return
        lived_s = time.monotonic() - part.started_at
        part.deaths = 1 if lived_s > STABLE_AFTER_S else part.deaths + 1
        pause = backoff_s(part.deaths)
        part.start_at = time.monotonic() + pause
        log.warning("process died; starting it again", module=part.module, exit_code=code, pause_s=pause)

    def _tell_ready(self) -> None:
        if not self._was_up and self._answers("/healthz"):
            self._was_up = True
            sys.stdout.write(f"Turnout answers at {self._settings.url}; the engine is starting ...\n")
        if self._was_up and self._answers("/readyz"):
            self._was_ready = True
            sys.stdout.write(f"Ready: {self._settings.url} serves {self._settings.base_model.name}. Ctrl-C stops it.\n")
        sys.stdout.flush()

    def _answers(self, path: str) -> bool:
        try:
            with self._opener.open(f"{self._settings.url}{path}", timeout=2) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False

    def _end(self) -> None:
        """Open requests first, then the controller, then what it started."""
        log.info("stopping", drain_timeout_s=self._settings.drain_timeout_s)
        self._end_part(self._gateway, self._settings.drain_timeout_s + 10)
        self._end_part(self._controller, CONTROLLER_STOP_S)
        try:
            asyncio.run(stop_children(self._settings))
        except GatewayError as error:
            log.error("children not stopped", error=error.message)
        self._reap()
        log.info("stopped")

    def _end_part(self, part: _Part, within_s: float) -> None:
        if part.pid == 0:
            return
        os.kill(part.pid, signal.SIGTERM)
        deadline = time.monotonic() + within_s
        while part.pid and time.monotonic() < deadline:
            time.sleep(_POLL_S / 2)
            self._reap()
        if part.pid:
            log.error("process did not stop in time; killed", module=part.module)
            os.kill(part.pid, signal.SIGKILL)
            os.waitpid(part.pid, 0)
            part.pid = 0


def _die_with(parent: int):  # type: ignore[no-untyped-def]
    """In the child: SIGTERM when the supervisor dies, also if it died before this line."""
    library = ctypes.CDLL(None)

    def prepare() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def serve(settings: Settings) -> int:
    """Run the server until it is told to stop; the exit status. Raises `Conflict` when one runs over this home already."""
    with only_one(settings):
        return Supervisor(settings).run()


def main() -> None:
    """Entry of the process."""
    parser = argparse.ArgumentParser(prog="python -m gateway.supervisor", description="Run the server.")
    parser.add_argument("--home", type=Path, help="where the state lives; default: TURNOUT_HOME")
    arguments = parser.parse_args()
    try:
        settings = load_settings(**({"home": arguments.home} if arguments.home else {}))
        configure_logging(settings)
        sys.exit(serve(settings))
    except GatewayError as error:
        sys.exit(f"turnout: {error.message}")


if __name__ == "__main__":
    main()
