"""Take over the reference log-probabilities that a verify job leaves."""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from ..durable import put, remove_unfinished

REFERENCE_FILE = "reference.json"
MAX_REFERENCE_BYTES = 16 * 2**20


def install_reference(directory: Path, references: Path, digest: str) -> Path:
    """Copy `reference.json` to `<digest>.json`, whole or not at all. Raises `ValueError` when it is not a reference."""
    raw = _read(directory / REFERENCE_FILE)
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"left a {REFERENCE_FILE} that is not JSON") from error
    if not isinstance(found, dict) or found.get("digest") != digest or not found.get("prompts"):
        raise ValueError(f"left a {REFERENCE_FILE} that is not about {digest[:12]}")
    final = references / f"{digest}.json"
    remove_unfinished(final)
    put(final, raw)
    return final


def _read(path: Path) -> bytes:
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            raw = file.read(MAX_REFERENCE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"left no {REFERENCE_FILE} that can be read") from error
    if len(raw) > MAX_REFERENCE_BYTES:
        raise ValueError(f"left a {REFERENCE_FILE} larger than {MAX_REFERENCE_BYTES:,} bytes")
    return raw
