"""What an attempt leaves in its directory, read by the controller: progress, the result, the log. None of it is trusted."""

from __future__ import annotations

import math
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .models import JobResult, ProgressLine

PROGRESS_FILE = "progress.jsonl"
RESULT_FILE = "result.json"
LOG_FILE = "log.txt"
MAX_RESULT_BYTES = 8 * 2**20
_WINDOW_BYTES = 256 * 2**10
_TAIL_BYTES = 8 * 2**10
_TAIL_LINES = 6
_TAIL_CHARACTERS = 800
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
_KEY = re.compile(r"\btn-[A-Za-z0-9_-]{20,}")


def read_progress(directory: Path, offset: int) -> tuple[int, list[ProgressLine]]:
    """Whole lines after `offset`, and where the next read begins."""
    try:
        with (directory / PROGRESS_FILE).open("rb") as file:
            file.seek(offset)
            window = file.read(_WINDOW_BYTES)
    except FileNotFoundError:
        return offset, []
    whole = window.rfind(b"\n") + 1
    if whole == 0 and len(window) == _WINDOW_BYTES:
        return offset + len(window), [_warning("a line of progress was too long to keep")]
    lines = [_progress_line(raw) for raw in window[:whole].splitlines() if raw.strip()]
    return offset + whole, lines


def read_result(directory: Path) -> JobResult | None:
    """The result, once it is there. Raises `ValueError` when it is not one."""
    path = directory / RESULT_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{RESULT_FILE} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        raw = file.read(MAX_RESULT_BYTES + 1)
    if len(raw) > MAX_RESULT_BYTES:
        raise ValueError(f"{RESULT_FILE} is larger than {MAX_RESULT_BYTES:,} bytes")
    try:
        result = JobResult.model_validate_json(raw)
    except ValidationError as error:
        raise ValueError(f"{RESULT_FILE} is not a result: {error.error_count()} field(s) are wrong") from error
    return result.model_copy(update={"data": finite(result.data)})


def log_tail(directory: Path, *, home: Path) -> str:
    """The last lines of the log, fit to be shown: no colours, addresses, keys or paths of this machine."""
    try:
        with (directory / LOG_FILE).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    text = _CONTROL.sub("", text).replace(str(home), "<home>").replace(str(Path.home()), "~")
    text = _KEY.sub("tn-…", _ADDRESS.sub("0x…", text))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_TAIL_LINES:])[-_TAIL_CHARACTERS:]


def finite(value: Any) -> Any:
    """The same value with null for what JSON has no number for: a loss may well become NaN."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: finite(inner) for key, inner in value.items()}
        case list():
            return [finite(inner) for inner in value]
        case _:
            return value


def _progress_line(raw: bytes) -> ProgressLine:
    try:
        line = ProgressLine.model_validate_json(raw)
    except ValidationError:
        return _warning("a line of progress could not be read")
    at = line.at if line.at.tzinfo else line.at.replace(tzinfo=UTC)
    return line.model_copy(update={"at": at, "data": finite(line.data)})


def _warning(message: str) -> ProgressLine:
    return ProgressLine(at=datetime.now(UTC), level="warn", message=message)
