"""Who holds SQLite's lock, as the kernel tells it: also of a process that is stopped and can tell nothing itself.

SQLite locks bytes of the database file (sqlite.org/lockingv3.html, os_unix.c): one to read, others to write. In WAL mode
writers lock a byte of the `-shm` file instead, and readers are in nobody's way.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .processes import PROC, stat_fields

_PENDING, _RESERVED, _SHARED = 0x40000000, 0x40000001, 0x40000002
_WAL_WRITE = 120
_LOOKS, _LOOK_EVERY_S = 10, 0.05

Kind = Literal["controller", "gateway", "supervisor", "turnout", "other"]
_KINDS: dict[str, Kind] = {
    "gateway.controller": "controller",
    "gateway.app": "gateway",
    "gateway.supervisor": "supervisor",
}


@dataclass(frozen=True, slots=True)
class LockHolder:
    """A process that keeps others from writing, or from everything."""

    pid: int
    kind: Kind
    holds: Literal["write", "read"]
    is_stopped: bool

    @property
    def sentence(self) -> str:
        """`the controller (pid 4711, stopped) holds it to write`."""
        name = (
            "another program" if self.kind == "other" else f"the {self.kind}" if self.kind != "turnout" else "turnout"
        )
        return f"{name} (pid {self.pid}{', stopped' if self.is_stopped else ''}) holds it to {self.holds}"


def lock_holders(file: Path) -> list[LockHolder] | None:
    """Who holds a lock on this database right now, writers first; None where one cannot tell."""
    try:
        text = (PROC / "locks").read_text()
    except OSError:
        return None
    found: dict[int, Literal["write", "read"]] = {}
    for path in (file, file.with_name(f"{file.name}-shm")):
        try:
            status = path.stat()
        except OSError:
            continue
        for pid, holds in _holding(text, status.st_ino, is_wal=path != file):
            if found.get(pid) != "write" and _may_have_open(pid, status):
                found[pid] = holds
    holders = [LockHolder(pid, _kind(pid), holds, _is_stopped(pid)) for pid, holds in found.items()]
    return sorted(holders, key=lambda holder: (holder.holds != "write", holder.pid))


def steady_holders(file: Path) -> list[LockHolder] | None:
    """Those who hold it at every one of several looks: a healthy process is done within milliseconds."""
    steady = lock_holders(file)
    for _ in range(_LOOKS):
        if not steady:
            return steady
        time.sleep(_LOOK_EVERY_S)
        now = lock_holders(file) or []
        steady = [holder for holder in now if any(holder.pid == before.pid for before in steady)]
    return steady


class LockWatch:
    """Remembers since when each holder was seen at every look."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._since: dict[int, float] = {}
        self.holders: Sequence[tuple[LockHolder, float]] = ()

    def look(self) -> None:
        """Look once more; `holders` then has each with the seconds that it was seen for."""
        if self._file is None:
            return
        found = lock_holders(self._file) or []
        clock = time.monotonic()
        self._since = {holder.pid: self._since.get(holder.pid, clock) for holder in found}
        self.holders = [(holder, clock - self._since[holder.pid]) for holder in found]


def _holding(text: str, inode: int, *, is_wal: bool) -> Iterator[tuple[int, Literal["write", "read"]]]:
    for line in text.splitlines():
        fields = line.split()
        if len(fields) != 8 or fields[1] != "POSIX" or not fields[5].endswith(f":{inode}"):
            continue  # others, and those that wait (`->`)
        first, last = int(fields[6]), int(fields[7]) if fields[7].isdigit() else 2**63
        if is_wal:
            if fields[3] == "WRITE" and first <= _WAL_WRITE <= last:
                yield int(fields[4]), "write"
        elif fields[3] == "WRITE" and first <= _SHARED and last >= _PENDING:
            yield int(fields[4]), "write"
        elif fields[3] == "READ" and first <= _SHARED <= last:
            yield int(fields[4]), "read"


def _may_have_open(pid: int, status: os.stat_result) -> bool:
    """Whether it is this file: numbers of inodes repeat among file systems. True when the process may not be looked at."""
    try:
        descriptors = list((PROC / str(pid) / "fd").iterdir())
    except OSError:
        return True
    for descriptor in descriptors:
        with suppress(OSError):
            seen = descriptor.stat()
            if (seen.st_ino, seen.st_dev) == (status.st_ino, status.st_dev):
                return True
    return False


def _kind(pid: int) -> Kind:
    try:
        argv = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "other"
    for module, kind in _KINDS.items():
        if module in argv:
            return kind
    is_ours = "gateway.cli" in argv or any(Path(word).name == "turnout" for word in argv[:2])
    return "turnout" if is_ours else "other"


def _is_stopped(pid: int) -> bool:
    fields = stat_fields(pid)
    return fields is not None and fields[0] in "Tt"
