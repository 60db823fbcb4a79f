"""Who writes next. Moves of traffic go first: within a process by a queue, among processes by standing back.

SQLite lets whoever asks at the right moment write, so a busy writer can keep a move out for as long as it likes. Two
means against that. `Turns` is the process's own queue, in which the urgent go before all others. `Hurry` is a file
beside the database: who is in a hurry holds a lock on it, and everybody else looks there before asking SQLite. The kernel
lets the lock go with its holder; one that is stopped and holds it for too long is no longer waited for.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

STAND_BACK_S = 15.0
# The kernel's `struct flock`: type, whence, start, length (0: to the end), and a pid that has to be 0 here.
_FLOCK = "hhqqi4x"


class Turns:
    """A lock that is handed on: to the first of the urgent, else to the first of the others."""

    def __init__(self) -> None:
        self._is_held = False
        self._urgent: deque[asyncio.Future[None]] = deque()
        self._others: deque[asyncio.Future[None]] = deque()

    async def acquire(self, *, urgent: bool = False) -> None:
        """Wait for the turn; `release` ends it."""
        if not self._is_held:
            self._is_held = True
            return
        queue = self._urgent if urgent else self._others
        turn = asyncio.get_running_loop().create_future()
        queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                queue.remove(turn)
            else:  # it came at the same moment
                self.release()
            raise

    def release(self) -> None:
        """Hand the turn on."""
        for queue in (self._urgent, self._others):
            while queue:
                turn = queue.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._is_held = False


class Hurry:
    """The sign by which processes over one database file show each other that a move of traffic waits or writes."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(f"{database.name}-hurry")
        self._descriptor: int | None = None
        self._ours = 0
        self._seen_since: float | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Others stand back in this block. Where the file cannot be used they do not, and that is all."""
        self._ours += 1
        if self._ours == 1:
            self._lock(fcntl.F_RDLCK)
        try:
            yield
        finally:
            self._ours -= 1
            if self._ours == 0:
                self._lock(fcntl.F_UNLCK)

    def is_shown_by_another(self) -> bool:
        """Whether to stand back now. Not for ever: a process that is stopped in its hurry must not stop the rest."""
        if not self._is_locked():
            self._seen_since = None
            return False
        self._seen_since = self._seen_since or time.monotonic()
        return time.monotonic() - self._seen_since < STAND_BACK_S

    def close(self) -> None:
        """Let the file go."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, kind: int) -> None:
        try:
            fcntl.fcntl(self._opened(), fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            log.warning("others cannot see that a move waits", error=str(error), path=str(self._path))

    def _is_locked(self) -> bool:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            found = fcntl.fcntl(self._opened(), fcntl.F_OFD_GETLK, asked)
        except OSError:
            return False
        return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)

    def _opened(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return self._descriptor
