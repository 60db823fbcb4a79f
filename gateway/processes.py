"""Children of the controller: started in process groups of their own, found again after a crash, never left behind.

A child is identified by (pid, start time), so a reused pid is never taken for it, and carries a mark in its environment,
so that it is found even when the controller died between starting it and writing its row.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
from sqlalchemy import RowMapping, delete, insert, select

from . import tables
from .database import Database
from .errors import Conflict, Unavailable

log = structlog.get_logger(__name__)

MARK_VARIABLE = "TURNOUT_CHILD"
MAX_LOG_BYTES = 16 * 2**20
PROC = Path("/proc")
_POLL_S = 0.02
_KILLED_WITHIN_S = 10.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class ChildStatus:
    """What is known of a child; the exit code only by the controller that started it."""

    state: Literal["running", "exited", "absent"]
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Child:
    """A child's row."""

    id: str
    kind: str
    pid: int
    started: float
    argv_digest: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Seen:
    """One process as the kernel shows it; `started` in seconds since the machine's start, so no clock moves it."""

    pid: int
    group: int
    started: float
    is_zombie: bool


def home_marker(home: Path) -> str:
    """The mark of one home directory: two servers on one machine never take each other's children."""
    return hashlib.sha256(str(home).encode()).hexdigest()[:16]


def argv_digest(argv: Sequence[str]) -> str:
    """Identity of a command line."""
    return hashlib.sha256("\0".join(argv).encode()).hexdigest()


class ProcessTable:
    """Every child of this home directory, by id; rows outlive the controller."""

    def __init__(self, database: Database, marker: str) -> None:
        self._database = database
        self._marker = marker
        self._own: dict[str, int] = {}  # pids that this very process started, and so must reap
        self._unreaped: set[int] = set()  # forgotten while threads of theirs were still ending
        self._exit_codes: dict[int, int] = {}

    async def spawn(
        self,
        name: str,
        *,
        kind: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        log: Path,
        attempt: int = 1,
    ) -> int:
        """Start a child with exactly `env` and its mark; its output goes to `log`. The pid.

        Raises `Conflict` while a child of this id runs, `Unavailable` when the program cannot be started.
        """
        if (await self.status(name)).state == "running":
            raise Conflict(f"process {name!r} is already running", code="already_running")
        marked = {**env, MARK_VARIABLE: f"{self._marker}:{name}:{attempt}"}
        await asyncio.to_thread(_prepare_log, log)
        await self._database.check_fence()
        # Not in a thread: a cancellation that came while it ran would leave a child that nobody knows.
        pid = _start(name, argv, marked, cwd, log)
        self._own[name] = pid
        self._exit_codes.pop(pid, None)
        seen = look_at(pid)
        try:
            await self._save(Child(name, kind, pid, seen.started if seen else 0.0, argv_digest(argv), attempt))
        except BaseException:  # without a row it would be nobody's; or it is another controller's turn by now
            _signal_group(pid, signal.SIGKILL)
            self._unreaped.add(self._own.pop(name))
            raise
        return pid

    async def child(self, name: str) -> Child | None:
        """The row of a child, running or not."""
        async with self._database.read() as connection:
            found = await connection.execute(select(tables.processes).where(tables.processes.c.id == name))
            row = found.mappings().one_or_none()
        return _child(row) if row else None

    async def children(self, kind: str | None = None) -> list[Child]:
        """Every row, or those of one kind."""
        query = select(tables.processes).order_by(tables.processes.c.id)
        if kind is not None:
            query = query.where(tables.processes.c.kind == kind)
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [_child(row) for row in rows]

    async def status(self, name: str) -> ChildStatus:
        """Whether the child runs. One that ended stays known until it is forgotten."""
        self._reap_forgotten()
        row = await self.child(name)
        if row is None:
            return ChildStatus("absent")
        if _is_alive(row):
            return ChildStatus("running")
        return ChildStatus("exited", self._exit_code(row))

    async def kill(self, name: str, grace_s: float = 10.0) -> None:
        """End the child and everything that it started: SIGTERM, and SIGKILL after `grace_s`. Returns when all are gone."""
        row = await self.child(name)
        if row is None:
            return
        await self._end(row, grace_s)

    async def forget(self, name: str) -> None:
        """Drop the row of a child that ended."""
        pid = self._own.pop(name, None)
        if pid is not None and pid not in self._exit_codes:
            self._unreaped.add(pid)
        self._reap_forgotten()
        async with self._database.write() as connection:
            await connection.execute(delete(tables.processes).where(tables.processes.c.id == name))

    async def adopt(self) -> list[Child]:
        """Take over from a controller that is gone: keep what still runs, end what has no row or lost its leader."""
        kept: list[Child] = []
        for row in await self.children():
            if _is_alive(row):
                kept.append(row)
                continue
            await self._end(row, 0.0)
            await self.forget(row.id)
        await self._sweep({row.pid for row in kept})
        if kept:
            log.info("children adopted", children=[row.id for row in kept])
        return kept

    async def stop_all(self, grace_s: float = 10.0) -> None:
        """End every child, also those that no row names; rows go with them."""
        rows = await self.children()
        await asyncio.gather(*(self._end(row, grace_s) for row in rows))
        await self._sweep(set())
        for row in rows:
            await self.forget(row.id)

    async def _sweep(self, keep: set[int]) -> None:
        strangers = await asyncio.to_thread(_marked_groups, f"{self._marker}:".encode())
        await self._database.check_fence()
        for group in strangers - keep:
            log.warning("orphan killed", group=group)
            await _end_group(group, 0.0)

    async def _end(self, row: Child, grace_s: float) -> None:
        self._exit_code(row)
        await self._database.check_fence()
        if _may_signal(row):
            await _end_group(row.pid, grace_s)
        marked = await asyncio.to_thread(_marked_groups, f"{self._marker}:{row.id}:".encode())
        for group in marked:
            await _end_group(group, grace_s)
        self._exit_code(row)

    def _exit_code(self, row: Child) -> int | None:
        """Reap, if it is ours to reap."""
        if self._own.get(row.id) != row.pid:
            return None
        if row.pid not in self._exit_codes:
            reaped, status = os.waitpid(row.pid, os.WNOHANG)
            if reaped:
                self._exit_codes[row.pid] = os.waitstatus_to_exitcode(status)
        return self._exit_codes.get(row.pid)

    def _reap_forgotten(self) -> None:
        self._unreaped = {pid for pid in self._unreaped if not _reaped(pid)}

    async def _save(self, row: Child) -> None:
        table = tables.processes
        async with self._database.write() as connection:
            await connection.execute(delete(table).where(table.c.id == row.id))
            await connection.execute(
                insert(table).values(
                    id=row.id,
                    kind=row.kind,
                    pid=row.pid,
                    started=row.started,
                    argv_digest=row.argv_digest,
                    attempt=row.attempt,
                )
            )


def _child(row: RowMapping) -> Child:
    return Child(row["id"], row["kind"], row["pid"], row["started"], row["argv_digest"], row["attempt"])


def _prepare_log(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    bound_log(path)


def _start(name: str, argv: Sequence[str], env: Mapping[str, str], cwd: Path, log_path: Path) -> int:
    try:
        with log_path.open("ab") as output:
            process = subprocess.Popen(
                list(argv),
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    except OSError as error:
        raise Unavailable(f"process {name!r} cannot be started: {error}", code="spawn_failed") from error
    # The child is meant to outlive this object and this process, which Popen would warn of; the table reaps by pid.
    process.returncode = 0
    return process.pid


def bound_log(path: Path) -> None:
    """Empty a log that is longer than `MAX_LOG_BYTES`, keeping its end as `<name>.1`; a child goes on writing to it.

    What is written in the moment between the copy and the cut is lost. A disk that takes no copy gets none.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no log yet, or a link that a job made of it
        return
    with os.fdopen(descriptor, "rb+") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size <= MAX_LOG_BYTES:
            return
        aside, kept = path.with_name(f".{path.name}.tmp"), path.with_name(f"{path.name}.1")
        try:
            aside.unlink(missing_ok=True)
            file.seek(found.st_size - MAX_LOG_BYTES)
            with aside.open("xb") as copy:
                copy.write(file.read(MAX_LOG_BYTES))
            aside.replace(kept)
        except OSError as error:
            log.warning("log cut without a copy", path=str(path), error=str(error))
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        file.truncate(0)


# ---- What the kernel knows ----------------------------------------------------------------------------------------


def _reaped(pid: int) -> bool:
    """Whether nothing of this child of ours is left. A leader that ended stays while a thread of it is still ending."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return True


def look_at(pid: int) -> Seen | None:
    """The process of this pid, or None."""
    fields = stat_fields(pid)
    if fields is None:
        return None
    return Seen(pid, group=int(fields[2]), started=int(fields[19]) / TICKS_PER_S, is_zombie=fields[0] in "ZX")


def stat_fields(pid: int) -> list[str] | None:
    """What `/proc/PID/stat` says behind pid and name, from the state on; None when the process is gone."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The second field is the name in parentheses, which may itself hold spaces and parentheses.
    return text[text.rindex(")") + 2 :].split()


def _processes() -> Iterable[Seen]:
    with os.scandir(PROC) as entries:
        names = [entry.name for entry in entries if entry.name.isdigit()]
    for name in names:
        if (seen := look_at(int(name))) is not None:
            yield seen


def _mark(pid: int) -> bytes | None:
    """The mark a process carries; None when it has none, or is not ours to look at."""
    try:
        environment = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return None
    for entry in environment.split(b"\0"):
        if entry.startswith(f"{MARK_VARIABLE}=".encode()):
            return entry.split(b"=", 1)[1]
    return None


def _marked_groups(prefix: bytes) -> set[int]:
    """Groups with a living member whose mark begins so. Ours is never among them."""
    found = set()
    for seen in _processes():
        if not seen.is_zombie and (mark := _mark(seen.pid)) is not None and mark.startswith(prefix):
            found.add(seen.group)
    return found - {os.getpgrp(), 0}


def _is_alive(row: Child) -> bool:
    seen = look_at(row.pid)
    return seen is not None and seen.started == row.started and not seen.is_zombie


def _may_signal(row: Child) -> bool:
    """Whether the group of the row's pid is still the child's. The kernel reuses no pid whose group has a member, so only
    a process that has this very pid and another start time can be a stranger's."""
    seen = look_at(row.pid)
    return seen is None or seen.started == row.started


def group_members(group: int) -> list[int]:
    """Living processes of a group, whoever leads it."""
    return [seen.pid for seen in _processes() if seen.group == group and not seen.is_zombie]


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return
    except PermissionError:
        log.error("group cannot be signalled", group=group, signal=number.name)


async def _end_group(group: int, grace_s: float) -> None:
    if grace_s > 0:
        _signal_group(group, signal.SIGTERM)
        if await _gone(group, grace_s):
            return
    _signal_group(group, signal.SIGKILL)
    if not await _gone(group, _KILLED_WITHIN_S):
        log.error("group outlives SIGKILL", group=group, members=group_members(group))


async def _gone(group: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while await asyncio.to_thread(group_members, group):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_POLL_S)
    return True
