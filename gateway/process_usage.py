"""What a process group has used of the machine, as the kernel counts it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from .processes import PROC, TICKS_PER_S, group_members, stat_fields


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group of processes has used since they started."""

    cpu_s: float
    waited_s: float | None  # ready to run, without a core; None where the kernel does not tell
    read_bytes: int


def group_usage(group: int) -> Usage:
    """What the living processes of a group have used, summed over their threads."""
    cpu_s, waited_s, read_bytes, tells_waits = 0.0, 0.0, 0, True
    for pid in group_members(group):
        cpu_s += _cpu_s(pid)
        read_bytes += _read_bytes(pid)
        waited = _waited_s(pid)
        tells_waits = tells_waits and waited is not None
        waited_s += waited or 0.0
    return Usage(cpu_s, waited_s if tells_waits else None, read_bytes)


def _cpu_s(pid: int) -> float:
    fields = stat_fields(pid)
    return 0.0 if fields is None else (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def _read_bytes(pid: int) -> int:
    """By calls, and by what is mapped into memory: weights are read either way."""
    try:
        lines = (PROC / str(pid) / "io").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar:", "read_bytes:")))


def _waited_s(pid: int) -> float | None:
    """Time that the threads of a process were ready to run and had no core; None where the kernel keeps no such count."""
    total, is_told = 0, False
    for path in (PROC / str(pid) / "task").glob("*/schedstat"):
        with contextlib.suppress(OSError):
            total += int(path.read_text().split()[1])
            is_told = True
    return total / 1e9 if is_told else None
