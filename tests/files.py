"""Files that another process may read at any moment, and what was forced to the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def put_text(path: Path, text: str) -> None:
    """Write a file whole: who reads it meanwhile gets all of the old text or all of the new. A plain write is empty at first."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def note_fsync(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What is forced to the disk from now on, in order, each under the name that it has then. It is forced all the same."""
    forced: list[Path] = []
    force = os.fsync

    def noting(descriptor: int) -> None:
        forced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        force(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    return forced
