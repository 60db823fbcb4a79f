"""The demo's commands: each is printed as a user would type it, then run."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
from rich.console import Console

STOP_TIMEOUT_S = 90.0
COMMAND_TIMEOUT_S = 20.0
CHILD_MARK = "TURNOUT_CHILD"  # a variable that engines and jobs carry, and nothing else does
_PR_SET_PDEATHSIG = 1


class DemoFailed(Exception):
    """A command did not end as it should, or something was left behind."""


@dataclass
class Commands:
    """Runs `turnout ...` against one server, in the repository's root, and times the steps."""

    root: Path
    environment: Mapping[str, str]
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """A part of the demo: its title first, its seconds after."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}. {title}[/]", align="left")
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)
        self.console.print(f"[dim]{self.seconds[name]:.1f} s[/]\n")

    def turnout(self, *arguments: str, expect: int = 0, or_else: int | None = None) -> int:
        """Run one command on the user's terminal; raises `DemoFailed` when its exit code is neither of those expected."""
        return self._run(arguments, expect=(expect, or_else), stdout=None)[0]

    def answer(self, *arguments: str) -> str:
        """Run one command and return what it printed, for the demo to show as much of it as helps."""
        return self._run(arguments, expect=(0,), stdout=subprocess.PIPE)[1]

    def _run(
        self, arguments: tuple[str, ...], *, expect: tuple[int | None, ...], stdout: int | None
    ) -> tuple[int, str]:
        self.console.print(f"$ turnout {shlex.join(arguments)}", style="bold cyan", markup=False)
        argv = [sys.executable, "-m", "gateway.cli", *arguments]
        process = subprocess.Popen(argv, cwd=self.root, env=self.environment, stdout=stdout, text=True)
        try:
            printed, _ = process.communicate()
        except BaseException:
            _end(process)
            raise
        if process.returncode not in expect:
            raise DemoFailed(f"`turnout {shlex.join(arguments)}` ended with {process.returncode}, expected {expect[0]}")
        return process.returncode, printed or ""


def _end(process: subprocess.Popen[str]) -> None:
    """Let a command clear up after itself; it may have a trainer below it."""
    process.terminate()
    try:
        process.wait(COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()


class Server:
    """`turnout serve` in the background, with everything it starts."""

    def __init__(self, commands: Commands, arguments: tuple[str, ...], *, home: Path, log: Path, keep: bool) -> None:
        commands.console.print(f"$ turnout serve {shlex.join(arguments)} &", style="bold cyan", markup=False)
        self._home = home
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway.cli", "serve", *arguments],
                cwd=commands.root,
                env=commands.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the demo first, which then stops this in good order
                preexec_fn=None if keep else _die_with_parent,
            )

    def check_alive(self) -> None:
        """Raise with the log's end when the server is gone."""
        if self.process.poll() is not None:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            raise DemoFailed(f"`turnout serve` ended with {self.process.returncode}; the end of {self._log}:\n{tail}")

    def stop(self) -> None:
        """SIGTERM, as an operator stops it; raises when some process outlives it."""
        below = _descendants(self.process.pid)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
        left = [process for process in {*below, *running_in(self._home)} if is_running(process)]
        names = [f"{process.pid} {' '.join(command_line(process))[:80]}" for process in left]
        for process in left:
            _kill(process)
        if names:
            raise DemoFailed(f"still running after `turnout serve` was told to stop: {'; '.join(names)}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def running_in(home: Path) -> list[psutil.Process]:
    """The server of this home and what it started; not this process, and nobody who only reads a file there."""
    return [p for p in psutil.process_iter() if p.pid != os.getpid() and _serves(p, home)]


def _serves(process: psutil.Process, home: Path) -> bool:
    words = command_line(process)
    if str(home) in (after for word, after in pairwise(words) if word == "--home"):
        return True
    return any(str(home) in word for word in words) and CHILD_MARK in _environment(process)


def _environment(process: psutil.Process) -> dict[str, str]:
    """Its variables; none when it is gone or not ours to look at."""
    try:
        return process.environ()
    except psutil.Error:
        return {}


def command_line(process: psutil.Process) -> list[str]:
    """Its arguments; none when it is gone or not ours to look at."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def is_running(process: psutil.Process) -> bool:
    """Whether it still does something: an ended process that nobody reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        return
