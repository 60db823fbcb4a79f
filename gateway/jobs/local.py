"""The local driver of jobs: each attempt is a process group of its own on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

import structlog

from ..processes import ProcessTable
from .models import ProcessSpec, ProcessState, ProcessStatus
from .output import LOG_FILE

log = structlog.get_logger(__name__)

PROCESS_KIND = "job"


class Jobs(Protocol):
    """What runs attempts. Idempotent on (job, attempt); only plain data crosses it."""

    async def submit(self, spec: ProcessSpec) -> None:
        """Start an attempt; nothing happens when it was started before."""

    async def status(self, job_id: str, attempt: int) -> ProcessStatus:
        """What became of an attempt."""

    async def cancel(self, job_id: str, attempt: int) -> None:
        """End an attempt with everything that it started, and forget it; returns when it is gone."""


class LocalJobs:
    """Subprocesses through the process table, which adopts them when the controller starts again."""

    def __init__(self, processes: ProcessTable, *, grace_s: float = 10.0) -> None:
        self._processes = processes
        self._grace_s = grace_s
        self._deadlines: dict[str, float] = {}  # monotonic; a new controller gives an adopted attempt its time anew

    async def submit(self, spec: ProcessSpec) -> None:
        """Start the attempt in its own directory, with exactly the environment that the spec holds."""
        name = _name(spec.job_id, spec.attempt)
        if (await self._processes.status(name)).state != "absent":
            return
        output = Path(spec.output)
        await self._processes.spawn(
            name,
            kind=PROCESS_KIND,
            argv=spec.argv,
            env=spec.env,
            cwd=output,
            log=output / LOG_FILE,
            attempt=spec.attempt,
        )
        self._deadlines[name] = time.monotonic() + spec.timeout_s

    async def status(self, job_id: str, attempt: int) -> ProcessStatus:
        """Look at the attempt's process; one that outlived its time is ended."""
        name = _name(job_id, attempt)
        found = await self._processes.status(name)
        if found.state == "absent":
            return ProcessStatus(state=ProcessState.LOST)
        if found.state == "exited":
            state = ProcessState.SUCCEEDED if found.exit_code == 0 else ProcessState.FAILED
            return ProcessStatus(state=state, exit_code=found.exit_code)
        if time.monotonic() > self._deadlines.get(name, float("inf")):
            log.warning("attempt outlived its time", job=job_id, attempt=attempt)
            await self.cancel(job_id, attempt)
            return ProcessStatus(state=ProcessState.FAILED)
        return ProcessStatus(state=ProcessState.RUNNING)

    async def cancel(self, job_id: str, attempt: int) -> None:
        """SIGTERM to the group, SIGKILL to what remains."""
        name = _name(job_id, attempt)
        await self._processes.kill(name, self._grace_s)
        await self._processes.forget(name)
        self._deadlines.pop(name, None)


def _name(job_id: str, attempt: int) -> str:
    return f"{job_id}.{attempt}"
