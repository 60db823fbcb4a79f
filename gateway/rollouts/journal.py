"""The journal of moves that were made without the database: one JSON line each, on disk before it counts.

A line is written once and never changed; another line says what became of it. So the file is also the history.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import structlog
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ..durable import fsync
from ..errors import Unavailable
from ..routing.models import Trial
from ..routing.overlay import Override

log = structlog.get_logger(__name__)


class Pointing(BaseModel, frozen=True):
    """Where a route points."""

    stable: str
    previous: str
    candidate: str | None
    variants: tuple[tuple[str, int], ...]
    trial: Trial | None = None


class Rollback(BaseModel, frozen=True):
    """A rollback that traffic follows although the database could not be told."""

    kind: Literal["rollback"] = "rollback"
    id: str
    at: datetime
    actor: str
    reason: str
    route: str
    project_id: str
    decided_on: int = Field(description="the route's revision that it was decided on")
    to: str | None = Field(description="where it was asked to go; null: back")
    before: Pointing
    after: Pointing
    left: tuple[str, ...] = Field(description="targets that lose their traffic")
    marks: tuple[str, ...] = Field(description="versions that return by force only")
    unmarks: str | None = None
    withdrawn: tuple[str, ...] = ()

    @property
    def override(self) -> Override:
        """What it makes of the routing table."""
        return Override(
            route=self.route,
            project_id=self.project_id,
            decided_on=self.decided_on,
            stable=self.after.stable,
            previous=self.after.previous,
            candidate=self.after.candidate,
            left=self.left,
            marks=self.marks,
            unmarks=self.unmarks,
        )


Outcome = Literal["applied", "superseded", "route_gone"]


class Settled(BaseModel, frozen=True):
    """The database knows of it now."""

    kind: Literal["settled"] = "settled"
    id: str
    at: datetime
    outcome: Outcome


_LINE: TypeAdapter[Rollback | Settled] = TypeAdapter(Annotated[Rollback | Settled, Field(discriminator="kind")])


class Journal:
    """The file, and what is open in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.refused_lines = 0
        self._open: dict[str, Rollback] = {}
        for line in self._lines():
            self._note(line)

    @property
    def open(self) -> tuple[Rollback, ...]:
        """What the database does not know yet, in order."""
        return tuple(self._open.values())

    def append(self, line: Rollback | Settled) -> None:
        """Have it on disk, then count it. Raises `Unavailable` when the disk does not take it: then it does not count."""
        try:
            self._write(line.model_dump_json().encode() + b"\n")
        except OSError as error:
            raise Unavailable(
                f"the journal {self._path.name} cannot be written: {error.strerror}; nothing was moved",
                code="journal_failed",
            ) from error
        self._note(line)

    def _note(self, line: Rollback | Settled) -> None:
        if isinstance(line, Rollback):
            self._open[line.id] = line
        else:
            self._open.pop(line.id, None)

    def _write(self, content: bytes) -> None:
        is_new = not self._path.exists()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # cut off by a crash: it was never answered
                content = b"\n" + content
            try:
                if os.write(descriptor, content) != len(content):
                    raise OSError(0, "it took a part only")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            fsync(self._path.parent)

    def _lines(self) -> list[Rollback | Settled]:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return []
        found: list[Rollback | Settled] = []
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                found.append(_LINE.validate_json(line))
            except ValidationError as error:
                self.refused_lines += 1
                log.error("line of the journal refused", line=number, path=str(self._path), error=str(error)[:300])
        return found
