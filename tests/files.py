"""Files that another process may read at any moment."""

from __future__ import annotations

import os
from pathlib import Path


def put_text(path: Path, text: str) -> None:
    """Write a file whole: who reads it meanwhile gets all of the old text or all of the new. A plain write is empty at first."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)
