"""`turnout train`: fine-tune on this machine, in a process of its own, without a server."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from .cli_console import ExitCode, Session, session, short
from .errors import GatewayError

_STOPPED = 143  # the trainer's exit code after a signal it understood
_STOPPING = b"Stopping: the trainer ends the operation that it is in. Ctrl-C again ends it at once.\n"
_KILLED_WITHIN_S = 60.0  # only the kernel can hold a killed process up
_TAIL_LINES = 12
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def train(
    context: typer.Context,
    preset: str = typer.Argument(help="YAML file, or the name of a preset that ships, such as sft."),
    values: list[str] = typer.Option(
        [], "--set", "-s", metavar="KEY=VALUE", help="Override a value of the preset; repeatable."
    ),
    output: Path = typer.Option(..., "--output", "-o", help="Folder that becomes the bundle; must not exist yet."),
) -> None:
    """Fine-tune an adapter and leave a bundle to publish.

    Ctrl-C stops it between two operations, a second one at once; the same command goes on from the last checkpoint.
    """
    shell = session(context)
    argv = [sys.executable, "-m", "trainer.run", preset, "--output", str(output), "--json"]
    argv += [word for value in values for word in ("--set", value)]
    log = output.with_name(f".{output.name}.trainer.log")  # `NAME.log` is where users put what we say
    log.parent.mkdir(parents=True, exist_ok=True)
    _adopt_orphans()
    with log.open("wb") as errors, _Stop().on_signals() as stop:
        process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=_die_with_parent,
        )
        stop.watch(process)
        try:
            trained = _follow(shell, process)
        except BaseException:
            process.terminate()
            process.communicate()  # reads on: what the trainer says last breaks no pipe
            raise
        code = stop.wait(process)
    if code == 0 and trained is not None:
        log.unlink()
        shell.show(trained, lambda: _done(trained))
        return
    raise _ended(shell, code, log)


@dataclass
class _Stop:
    """What signals mean while a trainer runs: the first asks it to stop, the next one ends it at once.

    Neither interrupts this process, which reads what the trainer says to the end and outlives it.
    """

    asked: int = 0
    process: subprocess.Popen[str] | None = None

    @contextmanager
    def on_signals(self) -> Iterator[_Stop]:
        """Until the block ends. A signal that whoever started us wants ignored stays ignored."""
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        heard = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
        for number in heard:
            signal.signal(number, self._came)
        try:
            yield self
        finally:
            for number, handler in heard.items():
                signal.signal(number, handler)

    def _came(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked > 1:
            _kill_below()
            return
        if self.process is not None:
            self.process.terminate()
        with suppress(OSError):  # not through a console: this may have interrupted one
            os.write(sys.stderr.fileno(), _STOPPING)

    def watch(self, process: subprocess.Popen[str]) -> None:
        """From now on there is a trainer; one that was started too late to hear a signal is told."""
        self.process = process
        if self.asked:
            process.terminate()

    def wait(self, process: subprocess.Popen[str]) -> int:
        """The trainer's exit code, when it and all that it started are gone."""
        code = process.wait()
        if self.asked:
            psutil.wait_procs(_kill_below(), timeout=_KILLED_WITHIN_S)
        return _STOPPED if self.asked and code else code


def _kill_below() -> list[psutil.Process]:
    """SIGKILL of everything that this process started, also of what a dead trainer left."""
    found = psutil.Process().children(recursive=True)
    for child in found:
        with suppress(psutil.Error):
            child.kill()
    return found


def _adopt_orphans() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _follow(shell: Session, process: subprocess.Popen[str]) -> dict[str, Any] | None:
    """Show progress until the trainer has said all; its last word when it succeeded."""
    trained: dict[str, Any] | None = None
    console = shell.notes if shell.as_json else shell.out
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("Loading", total=None)
        for said in _lines(process):
            if "trained" in said:
                trained = said["trained"]
            else:
                _tell(progress, bar, said)
    return trained


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """Lines of JSON; whatever a library prints beside them is passed over."""
    for line in process.stdout or ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found


def _tell(progress: Progress, bar: TaskID, said: dict[str, Any]) -> None:
    """A step moves the bar; anything else is a line above it. Without a terminal every fifth of the way is a line."""
    numbers = said.get("numbers") or {}
    level = said.get("level", "info")
    message = str(said.get("message", ""))
    if "step" not in numbers or level != "info":
        style = {"warn": "yellow", "error": "red"}.get(level, "")
        progress.console.print(Text(message, style=style))
        return
    step, total = numbers["step"], numbers.get("total_steps") or None
    before = progress.tasks[0].completed
    loss = numbers.get("train_loss")
    progress.update(
        bar, completed=step, total=total, description=f"Training, loss {loss:.3f}" if loss is not None else None
    )
    if "valid_loss" in numbers or (
        not progress.console.is_terminal and total and step * 5 // total > before * 5 // total
    ):
        progress.console.print(Text(message))


def _done(trained: dict[str, Any]) -> str:
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in trained.get("metrics", {}).items())
    return (
        f"Trained [bold]{trained['bundle']}[/]  {trained['steps']} steps, {trained['tokens']} tokens, "
        f"digest {short(str(trained['digest']))}\n{metrics}\nNext: turnout publish {trained['bundle']} --adapter NAME --wait"
    )


def _ended(shell: Session, code: int, log: Path) -> typer.Exit | GatewayError:
    """What to raise when there is no bundle. What the trainer knew, it has said already."""
    if code == _STOPPED:
        shell.notes.print("Stopped. The same command goes on from the last complete checkpoint.")
        return typer.Exit(ExitCode.INTERRUPTED)
    if code == ExitCode.UNDECIDED:  # wrong preset, override or data: usage
        log.unlink()
        return typer.Exit(ExitCode.UNDECIDED)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
    return GatewayError(f"training ended with {code}; the end of {log}:\n{tail}", code="training_failed")
