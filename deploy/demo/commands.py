"""The demo's commands: each is printed as a user would type it, then run."""

from __future__ import annotations

import ctypes
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from .stopping import Interrupts, Stopper, is_running, itself_and_below, running_in

# Against hanging: a server bounds each part of its own end, and on a slow machine the parts add up.
STOP_TIMEOUT_S = 300.0
# For a command that is not wanted any more. A trainer hears a signal between two operations; a backward pass is one, and took
# 46 s on two cores that others used too. Whoever does not want to wait asks again.
COMMAND_TIMEOUT_S = 120.0
_LOOK_EVERY_S = 1.0
_PR_SET_PDEATHSIG = 1


class DemoFailed(Exception):
    """A command did not end as it should, or something was left behind."""


@dataclass
class Commands:
    """Runs `turnout ...` against one server, in the repository's root, and times the steps.

    `check` is asked while a command runs; it raises when the command cannot succeed any more.
    """

    root: Path
    environment: Mapping[str, str]
    console: Console
    interrupts: Interrupts
    seconds: dict[str, float] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None

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
        process = subprocess.Popen(
            argv,
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            text=True,
            start_new_session=True,  # Ctrl-C reaches the demo, which passes it on and waits
            preexec_fn=_die_with_parent,
        )
        try:
            printed = self._wait(process)
        except BaseException:
            with self.interrupts.held():
                self._end(process, f"`turnout {arguments[0]}`")
            raise
        if process.returncode not in expect:
            raise DemoFailed(f"`turnout {shlex.join(arguments)}` ended with {process.returncode}, expected {expect[0]}")
        return process.returncode, printed

    def _wait(self, process: subprocess.Popen[str]) -> str:
        while True:
            try:
                return process.communicate(timeout=_LOOK_EVERY_S)[0] or ""
            except subprocess.TimeoutExpired:
                self.check()

    def _end(self, process: subprocess.Popen[str], what: str) -> None:
        """Let a command clear up after itself; it may have a trainer below it."""
        Stopper(self.interrupts, self.console).end(
            what,
            ask=process.terminate,
            is_over=lambda: not any(map(is_running, itself_and_below(process.pid))),
            family=lambda: itself_and_below(process.pid),
            grace_s=COMMAND_TIMEOUT_S,
        )
        if process.stdout is not None:
            process.stdout.close()
        process.wait()


class Server:
    """`turnout serve` in the background, with everything it starts."""

    def __init__(self, commands: Commands, arguments: tuple[str, ...], *, home: Path, log: Path, keep: bool) -> None:
        commands.console.print(f"$ turnout serve {shlex.join(arguments)} &", style="bold cyan", markup=False)
        self._home = home
        self._log = log
        self._stopper = Stopper(commands.interrupts, commands.console)
        self._interrupts = commands.interrupts
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
        pid = self.process.pid
        with self._interrupts.held():
            ended = self._stopper.end(
                "the server",
                ask=self._ask_to_stop,
                is_over=lambda: self.process.poll() is not None,
                family=lambda: {*itself_and_below(pid), *running_in(self._home)},
                grace_s=STOP_TIMEOUT_S,
            )
            self.process.poll()
        if ended.outlived and not self._interrupts.is_urgent:
            raise DemoFailed(f"still running after `turnout serve` was told to stop: {'; '.join(ended.outlived)}")

    def _ask_to_stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
