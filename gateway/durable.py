"""What is on the disk for good: whole, or not at all, whenever the power goes."""

from __future__ import annotations

import os
import secrets
from glob import escape
from pathlib import Path

_UNFINISHED = ".tmp"


def fsync(path: Path) -> None:
    """Force a file, or a directory's entries, to the disk. A failure is never tried again: the kernel forgets the lost pages."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Force a folder to the disk with all files and folders in it; its own name in its parent is the caller's to force."""
    for root, _, files in os.walk(folder, topdown=False):
        for name in files:
            fsync(Path(root, name))
        fsync(Path(root))


def write_new(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write a file and force it to the disk, not yet its name. `FileExistsError` when there is one."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def put(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Write or replace a file in one step: whoever reads it, after a crash too, finds all of the old one or all of this."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_UNFINISHED}")
    try:
        write_new(unfinished, content, mode=mode)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    fsync(path.parent)


def remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed while they `put` this file have left; what a living one writes stays."""
    for left in path.parent.glob(f"{escape(path.name)}.*{_UNFINISHED}"):
        pid = left.name.removeprefix(f"{path.name}.").removesuffix(_UNFINISHED).partition("-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            left.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
