"""`turnout train`: fine-tune on this machine, in a process of its own, without a server."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
_TAIL_LINES = 12
_PR_SET_PDEATHSIG = 1


def train(
    context: typer.Context,
    preset: str = typer.Argument(help="YAML file, or the name of a preset that ships, such as sft."),
    values: list[str] = typer.Option(
        [], "--set", "-s", metavar="KEY=VALUE", help="Override a value of the preset; repeatable."
    ),
    output: Path = typer.Option(..., "--output", "-o", help="Folder that becomes the bundle; must not exist yet."),
) -> None:
    """Fine-tune an adapter and leave a bundle to publish. Ctrl-C stops; the same command goes on from the last checkpoint."""
    shell = session(context)
    argv = [sys.executable, "-m", "trainer.run", preset, "--output", str(output), "--json"]
    argv += [word for value in values for word in ("--set", value)]
    log = output.with_name(f"{output.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=_die_with_parent,
        )
        try:
            trained = _follow(shell, process)
            code = process.wait()
        except KeyboardInterrupt:  # the trainer got the signal too
            code = process.wait() and _STOPPED
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code == 0 and trained is not None:
        log.unlink()
        shell.show(trained, lambda: _done(trained))
        return
    raise _ended(shell, code, log)


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
