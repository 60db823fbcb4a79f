"""How many files this process may have open: each connection is one, and its way to the engine another."""

from __future__ import annotations

import resource
from contextlib import suppress
from typing import NamedTuple

from ..errors import Invalid

# For everything but connections: 16 in a gateway at rest, the database's pool with its journals (15 times two), and
# connections that are cut and whose file is closed a moment later (door.py: 32).
RESERVED_FILES = 96
FILES_PER_CONNECTION = 2
MIN_CONNECTIONS = 16
_UNLIMITED = 2**31


class FileLimit(NamedTuple):
    """What the kernel allows: now, and at most without being root."""

    soft: int
    hard: int


def file_limit() -> FileLimit:
    """Of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FileLimit(*(_UNLIMITED if value == resource.RLIM_INFINITY else value for value in (soft, hard)))


def raise_file_limit() -> None:
    """As far as it goes without being root. The usual 1,024 are meant for programs that call select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some sandboxes forbid it; there are fewer connections then
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_for(files: int) -> int:
    """How many connections so many files allow; 0 when they are too few to serve at all."""
    found = (files - RESERVED_FILES) // FILES_PER_CONNECTION
    return found if found >= MIN_CONNECTIONS else 0


def allowed_connections(wanted: int, files: int) -> int:
    """As many as the setting says, where the files allow it. Raises `Invalid` when they are too few to serve at all."""
    possible = connections_for(files)
    if possible == 0:
        needed = RESERVED_FILES + FILES_PER_CONNECTION * MIN_CONNECTIONS
        raise Invalid(
            f"this process may open {files} files and needs {needed} at least; {HOW_TO_RAISE}", code="too_few_files"
        )
    return min(wanted, possible)


HOW_TO_RAISE = "raise the limit: `ulimit -n 16384` before the start, or LimitNOFILE=16384 in a systemd unit"
