"""What an attempt leaves in its directory, read by the controller: progress, the result, the log. None of it is trusted."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from ..fitting import clean_text, fit
from ..tables import job_events, jobs
from .models import JobResult, ProgressLine

PROGRESS_FILE = "progress.jsonl"
RESULT_FILE = "result.json"
LOG_FILE = "log.txt"
MAX_RESULT_BYTES = 8 * 2**20
MAX_PROGRESS_BYTES = 32 * 2**20  # an attempt that says more is not listened to any longer; it may go on
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
        file = _open_plain(directory / PROGRESS_FILE)
    except OSError:
        return offset, []
    with file:
        if offset >= MAX_PROGRESS_BYTES:
            return max(offset, os.fstat(file.fileno()).st_size), []
        file.seek(offset)
        window = file.read(_WINDOW_BYTES)
    if offset + len(window) >= MAX_PROGRESS_BYTES:
        return offset + len(window), [
            _warning(f"more than {MAX_PROGRESS_BYTES:,} bytes of progress; the rest is not kept")
        ]
    whole = window.rfind(b"\n") + 1
    if whole == 0 and len(window) == _WINDOW_BYTES:
        return offset + len(window), [_warning("a line of progress was too long to keep")]
    lines = [_progress_line(raw) for raw in window[:whole].splitlines() if raw.strip()]
    return offset + whole, lines


def read_result(directory: Path) -> JobResult | None:
    """The result, once it is there. Raises `ValueError` when it is not one."""
    try:
        with _open_plain(directory / RESULT_FILE) as file:
            raw = file.read(MAX_RESULT_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{RESULT_FILE} cannot be read: {error.strerror}") from error
    if len(raw) > MAX_RESULT_BYTES:
        raise ValueError(f"{RESULT_FILE} is larger than {MAX_RESULT_BYTES:,} bytes")
    try:
        result = JobResult.model_validate_json(raw)
    except (ValidationError, ValueError, RecursionError) as error:
        count = f": {error.error_count()} field(s) are wrong" if isinstance(error, ValidationError) else ""
        raise ValueError(f"{RESULT_FILE} is not a result{count}") from error
    told = fit(jobs, {"error_code": result.error_code, "error_message": result.error_message, "result": result.data})
    return result.model_copy(
        update={
            "error_code": (told["error_code"] or "").strip() or None,
            "error_message": (told["error_message"] or "").strip() or None,
            "data": told["result"],
        }
    )


def log_tail(directory: Path, *, home: Path) -> str:
    """The last lines of the log, fit to be shown: no colours, addresses, keys or paths of this machine."""
    try:
        with _open_plain(directory / LOG_FILE) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    text = _CONTROL.sub("", text).replace(str(home), "<home>").replace(str(Path.home()), "~")
    text = _KEY.sub("tn-…", _ADDRESS.sub("0x…", text))
    lines = [line.strip() for line in clean_text(text, _TAIL_BYTES).splitlines() if line.strip()]
    return " | ".join(lines[-_TAIL_LINES:])[-_TAIL_CHARACTERS:]


def trained(data: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a training's result, each of the kind that those who show it count on."""
    tokens, metrics = data.get("trained_tokens"), data.get("metrics")
    is_count = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0
    return {"trained_tokens": tokens if is_count else None, "metrics": metrics if isinstance(metrics, dict) else {}}


def exit_reason(exit_code: int | None) -> str:
    """How a process ended that left no result."""
    if exit_code is None:
        return "ended without a result"
    if exit_code == -9:
        return "was killed (signal 9), most often for want of memory"
    if exit_code < 0:
        return f"was ended by signal {-exit_code}"
    return f"ended with exit code {exit_code} and without a result"


def _open_plain(path: Path) -> BinaryIO:
    """Open a regular file. Anything else that a job puts in its place is an `OSError`: a pipe would be waited for for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "not a regular file")
    return os.fdopen(descriptor, "rb")


def _progress_line(raw: bytes) -> ProgressLine:
    try:
        line = ProgressLine.model_validate_json(raw)
    except (ValidationError, ValueError, RecursionError):
        return _warning("a line of progress could not be read")
    told = fit(job_events, {"message": line.message, "data": line.data})
    return line.model_copy(update={"at": _moment(line.at), **told})


def _moment(said: datetime) -> datetime:
    """In UTC, and not after now: the last moments of the calendar fit no other time zone, nor a microsecond more."""
    try:
        at = said.replace(tzinfo=UTC) if said.tzinfo is None else said.astimezone(UTC)
    except OverflowError:
        return datetime.now(UTC)
    return min(at, datetime.now(UTC))


def _warning(message: str) -> ProgressLine:
    return ProgressLine(at=datetime.now(UTC), level="warn", message=message)
