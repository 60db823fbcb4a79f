"""What every command shares: where the server is, how to print, which exit code means what."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .client import Client
from .settings import Settings, load_settings

T = TypeVar("T")
WAIT_HELP = "Longest wait in seconds; left out: for as long as something moves."
POLL_S = 0.5
PIPE_COLUMNS = 160


@dataclass
class Patience:
    """How long a command waits: `in_all_s` at most, and `unchanged_s` for the next sign that something moves."""

    in_all_s: float | None
    unchanged_s: float
    _sign: object = None
    _moved_at: float = field(default_factory=time.monotonic)
    _began_at: float = field(default_factory=time.monotonic)

    def saw(self, sign: object) -> None:
        """What it looks like now; anything else than the last time is progress."""
        if sign != self._sign:
            self._sign, self._moved_at = sign, time.monotonic()

    @property
    def why(self) -> str | None:
        """Why it is over; None while it is not."""
        now = time.monotonic()
        if self.in_all_s is not None and now - self._began_at >= self.in_all_s:
            return f"{self.in_all_s:.0f} s are over"
        if now - self._moved_at >= self.unchanged_s:
            return f"nothing moved for {self.unchanged_s:.0f} s"
        return None


class ExitCode(IntEnum):
    """What the shell sees."""

    OK = 0
    FAILED = 1
    UNDECIDED = 2  # a gate that cannot tell; also Typer's code for wrong usage
    INTERRUPTED = 130


def a_console(*, stderr: bool) -> Console:
    """A console that is as wide as the terminal, and wide enough for tables in a pipe or a log."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_COLUMNS
    return console


@dataclass
class Session:
    """Options before the command, and the two ways to answer: for people, or as one JSON document."""

    url: str | None = None
    api_key: str | None = None
    as_json: bool = False
    out: Console = field(default_factory=lambda: a_console(stderr=False))
    notes: Console = field(default_factory=lambda: a_console(stderr=True))

    @property
    def is_live(self) -> bool:
        """Whether what was said can be said anew on the same line."""
        return (self.notes if self.as_json else self.out).is_terminal

    def client(self) -> Client:
        """A client of the server that the options name."""
        return Client(self.url, self.api_key)

    def show(self, data: object, people: Callable[[], object]) -> None:
        """Print `data` as JSON when asked for, else what `people` makes of it."""
        if self.as_json:
            sys.stdout.write(json.dumps(plain(data), indent=2, default=str) + "\n")
            return
        made = people()
        if made is not None:
            self.out.print(made)

    def show_line(self, data: object, people: Callable[[], object]) -> None:
        """`show` for one of many: JSON takes one line."""
        if self.as_json:
            sys.stdout.write(json.dumps(plain(data), default=str) + "\n")
            sys.stdout.flush()
            return
        self.out.print(people())

    def say(self, text: str) -> None:
        """A line of progress; kept off stdout when that carries JSON."""
        (self.notes if self.as_json else self.out).print(text)

    @contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[str], None]]:
        """A spinner while something takes its time; call the given function to change its words."""
        console = self.notes if self.as_json else self.out
        if not console.is_terminal:
            last = [text]
            console.print(escape(text))

            def tell(news: str) -> None:
                if news != last[0]:
                    last[0] = news
                    console.print(escape(news))

            yield tell
            return
        with console.status(escape(text)) as status:
            yield lambda news: status.update(escape(news))


def session(context: typer.Context) -> Session:
    """The session that the root command made."""
    found = context.find_root().obj
    if not isinstance(found, Session):
        raise TypeError("the root command has not run")
    return found


def settings_of(home: Path | None) -> Settings:
    """Settings of the server of this machine, perhaps of another home than TURNOUT_HOME."""
    return load_settings() if home is None else load_settings(None, home=home)


def plain(data: object) -> Any:
    """Models as dictionaries, at any depth."""
    if isinstance(data, BaseModel):
        return data.model_dump(mode="json")
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [plain(value) for value in data]
    return data


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table without clutter; empty cells show a dash, and nothing in a cell is read as markup."""
    headless = not any(columns)
    made = Table(
        *columns,
        title=title,
        title_justify="left",
        box=None,
        header_style="bold",
        pad_edge=False,
        show_header=not headless,
    )
    for row in rows:
        made.add_row(
            *(
                cell if isinstance(cell, Text) else Text("–" if cell is None or cell == "" else str(cell))
                for cell in row
            )
        )
    return made


def poll(look: Callable[[], T | None], *, every_s: float = POLL_S, patience: Patience | None = None) -> T | None:
    """Look until there is something to see; None when the patience is over."""
    while True:
        found = look()
        if found is not None:
            return found
        if patience is not None and patience.why is not None:
            return None
        time.sleep(every_s)


def short(digest: str) -> str:
    """Enough of a digest to tell it from others."""
    return digest[:12]


def moment(at: datetime | None) -> str | None:
    """A time as people read it, in UTC."""
    return at.strftime("%Y-%m-%d %H:%M:%S") if at else None


def clip(text: str | None, most: int) -> str:
    """A text on one line, cut where it is too long."""
    flat = " ".join((text or "").split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def size(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("the loop returns at GiB")


def verdict_text(verdict: str) -> Text:
    """A verdict in its colour."""
    colour = {"passed": "green", "failed": "red", "inconclusive": "yellow", "error": "red"}.get(verdict, "")
    return Text(verdict, style=colour)


def verdict_exit(verdict: str) -> ExitCode:
    """0 for passed, 2 for inconclusive, 1 for the rest."""
    match verdict:
        case "passed":
            return ExitCode.OK
        case "inconclusive":
            return ExitCode.UNDECIDED
        case _:
            return ExitCode.FAILED
