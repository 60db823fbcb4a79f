"""A driver of jobs that runs a function in place of a process. It keeps state as a real one does: an attempt starts once."""

from __future__ import annotations

from collections.abc import Callable

from gateway.jobs.models import ProcessSpec, ProcessState, ProcessStatus

Run = Callable[[ProcessSpec], ProcessStatus]


class FakeJobs:
    """Runs `run` when an attempt is submitted, and remembers what came of it. Outlives controllers, as processes do."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._known: dict[tuple[str, int], ProcessStatus] = {}
        self.submitted: list[ProcessSpec] = []

    async def submit(self, spec: ProcessSpec) -> None:
        if (spec.job_id, spec.attempt) not in self._known:
            self.submitted.append(spec)
            self._known[spec.job_id, spec.attempt] = self._run(spec)

    async def status(self, job_id: str, attempt: int) -> ProcessStatus:
        return self._known.get((job_id, attempt), ProcessStatus(state=ProcessState.LOST))

    async def cancel(self, job_id: str, attempt: int) -> None:
        self._known.pop((job_id, attempt), None)
