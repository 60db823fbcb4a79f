"""Which checkpoints may be resumed from: whole ones, of the very same training.

A kill in the middle of a save leaves a folder that looks like a checkpoint. So a marker with the size of every file is
written last; a folder without one, or with other files than it lists, is no checkpoint.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from gateway.durable import fsync, put

MARKER = "complete.json"
_FOLDER = re.compile(r"^checkpoint-([0-9]+)$")


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    path: Path
    step: int
    elapsed_s: float


def mark_complete(folder: Path, *, fingerprint: str, elapsed_s: float) -> None:
    """Say that the folder is whole. Everything is on disk before the marker is."""
    sizes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != MARKER:
            fsync(path)
            sizes[path.name] = path.stat().st_size
    fsync(folder)
    put(folder / MARKER, json.dumps({"fingerprint": fingerprint, "elapsed_s": elapsed_s, "files": sizes}).encode())


def last_complete(directory: Path, *, fingerprint: str) -> Checkpoint | None:
    """The newest whole checkpoint of the training that the fingerprint stands for."""
    found = [_read(path, fingerprint) for path in directory.glob("checkpoint-*")]
    return max((one for one in found if one is not None), key=lambda one: one.step, default=None)


def remove_incomplete(directory: Path, *, fingerprint: str) -> list[str]:
    """Delete what cannot be resumed from, so that no library takes it for a checkpoint; the names of what went."""
    gone = []
    for path in sorted(directory.glob("checkpoint-*")):
        if _read(path, fingerprint) is None:
            shutil.rmtree(path)
            gone.append(path.name)
    return gone


def _read(path: Path, fingerprint: str) -> Checkpoint | None:
    match = _FOLDER.match(path.name)
    if match is None or not path.is_dir():
        return None
    try:
        marker = json.loads((path / MARKER).read_text())
        whole = all((path / name).stat().st_size == size for name, size in marker["files"].items())
        same = marker["fingerprint"] == fingerprint
        elapsed_s = float(marker["elapsed_s"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Checkpoint(path, int(match[1]), elapsed_s) if whole and same else None
