"""How the demo ends early: no signal skips the clean-up, and that nothing is left running is said when it is true."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console

CHILD_MARK = "TURNOUT_CHILD"  # a variable that engines and jobs carry, and nothing else does
KILLED_WITHIN_S = 60.0  # only the kernel can hold a killed process up
_TOLD_AFTER_S = 0.5
_TOLD_EVERY_S = 10.0
_POLL_S = 0.05
_PR_SET_CHILD_SUBREAPER = 36

Family = Callable[[], set[psutil.Process]]


class Interrupts:
    """Ctrl-C and its like. The first ends the demo, a further one ends what cleans up after it; neither skips anything."""

    def __init__(self) -> None:
        self._count = 0
        self._is_raised = False
        self._holds = 0

    def listen(self) -> None:
        """From now on. A signal that whoever started us wants ignored stays ignored."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._came)

    @property
    def is_urgent(self) -> bool:
        """Whether somebody who asked once has asked again."""
        return self._count > 1

    @contextmanager
    def held(self) -> Iterator[None]:
        """Nothing interrupts this block: a first signal that comes meanwhile does so at its end."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self._raise_once()

    def _came(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self._raise_once()

    def _raise_once(self) -> None:
        if self._count and not self._is_raised and not self._holds:
            self._is_raised = True
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Ended:
    """What outlived being asked, and what outlived being killed."""

    outlived: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stopper:
    """Ends processes: asks, says what it waits for, and kills when told to hurry or when it takes too long."""

    interrupts: Interrupts
    console: Console

    def end(
        self, what: str, *, ask: Callable[[], None], is_over: Callable[[], bool], family: Family, grace_s: float
    ) -> Ended:
        """Ask, and give `grace_s` until `is_over`; whoever of the family still runs then is killed, and waited for."""
        ask()
        seen = self._wait(what, is_over, family, grace_s)
        outlived = _running(seen | family())
        if not outlived:
            return Ended()
        names = tuple(map(name_of, outlived))
        self.console.print(f"Killing {'; '.join(names)}", style="yellow", markup=False)
        return Ended(names, tuple(map(name_of, kill_all(lambda: seen | family()))))

    def _wait(self, what: str, is_over: Callable[[], bool], family: Family, grace_s: float) -> set[psutil.Process]:
        seen = family()
        started = time.monotonic()
        told_at = started + _TOLD_AFTER_S
        while not is_over() and not self.interrupts.is_urgent and time.monotonic() < started + grace_s:
            seen |= family()
            if time.monotonic() >= told_at:
                told_at += _TOLD_EVERY_S
                names = "; ".join(map(name_of, _running(seen)))
                self.console.print(
                    f"Stopping {what}, {time.monotonic() - started:.0f} s: waiting for {names}. Ctrl-C again ends it at once.",
                    style="yellow",
                    markup=False,
                )
            time.sleep(_POLL_S)
        return seen


def kill_all(family: Family) -> list[psutil.Process]:
    """SIGKILL, again for what was just being started, until all are gone; those that are not."""
    deadline = time.monotonic() + KILLED_WITHIN_S
    while left := _running(family()):
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        if time.monotonic() > deadline:
            return left
        time.sleep(_POLL_S)
    return []


def adopt_orphans() -> None:
    """What a killed child leaves behind becomes ours, so that it is found below this process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def below(pid: int) -> set[psutil.Process]:
    """Everything that a process started, and what is left of its session when it is gone."""
    try:
        found = set(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        found = set()
    return found | {process for process in psutil.process_iter() if process.pid != pid and _session(process) == pid}


def itself_and_below(pid: int) -> set[psutil.Process]:
    """The process too, if it is there."""
    with suppress(psutil.Error):
        return {psutil.Process(pid), *below(pid)}
    return below(pid)


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except OSError:
        return None


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


def name_of(process: psutil.Process) -> str:
    """As people find it again."""
    return f"{process.pid} {' '.join(command_line(process))[:80]}"


def is_running(process: psutil.Process) -> bool:
    """Whether it still does something: an ended process that nobody reaped does not, once the last of its threads ended."""
    try:
        if not process.is_running():
            return False
        return process.status() != psutil.STATUS_ZOMBIE or len(list(Path(f"/proc/{process.pid}/task").iterdir())) > 1
    except (psutil.Error, OSError):
        return False


def _running(processes: set[psutil.Process]) -> list[psutil.Process]:
    return sorted((process for process in processes if is_running(process)), key=lambda process: process.pid)
