"""An attempt's directory, seen from inside the job's process: read the spec, tell progress, leave one result."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ..durable import put
from .models import JobResult, ProgressLine


class WorkDirectory:
    """The only channel between a job's process and the controller."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._progress = path / "progress.jsonl"

    def spec(self) -> dict[str, Any]:
        """What the controller asked for."""
        found = json.loads((self.path / "spec.json").read_text())
        if not isinstance(found, dict):
            raise TypeError(f"{self.path / 'spec.json'} is not an object")
        return found

    def say(self, message: str, *, level: Literal["info", "warn", "error"] = "info", **data: Any) -> None:
        """Append one line of progress; with `data` it is a metrics event. Also the heartbeat."""
        line = ProgressLine(
            at=datetime.now(UTC), level=level, type="metrics" if data else "message", message=message, data=data or None
        )
        with self._progress.open("a") as file:
            file.write(line.model_dump_json() + "\n")

    def finish(
        self,
        token: str,
        *,
        ok: bool,
        error_code: str | None = None,
        error_message: str | None = None,
        data: dict[str, Any] | None = None,
    ) -> None:
        """Leave the result, whole or not at all."""
        result = JobResult(token=token, ok=ok, error_code=error_code, error_message=error_message, data=data or {})
        put(self.path / "result.json", result.model_dump_json().encode())
