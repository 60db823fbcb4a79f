"""Which moves a job may make, and which job starts next. Pure: reads no clock, no database."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from .models import Job, JobKind, JobState

S = JobState

TRANSITIONS: Mapping[JobState, frozenset[JobState]] = {
    S.VALIDATING_FILES: frozenset({S.QUEUED, S.FAILED, S.CANCELLED}),
    S.QUEUED: frozenset({S.RUNNING, S.PAUSED, S.FAILED, S.CANCELLED}),
    # Back to queued when an attempt died and another one is due.
    S.RUNNING: frozenset({S.QUEUED, S.PAUSED, S.PUBLISHING, S.SUCCEEDED, S.FAILED, S.CANCELLED}),
    S.PAUSED: frozenset({S.QUEUED, S.FAILED, S.CANCELLED}),
    S.PUBLISHING: frozenset({S.SUCCEEDED, S.FAILED, S.CANCELLED}),
    S.SUCCEEDED: frozenset(),
    S.FAILED: frozenset(),
    S.CANCELLED: frozenset(),
}

# A version waits for its verification, a gate for its evaluation, and both are short; training takes what is left.
PRIORITY: Mapping[JobKind, int] = {JobKind.VERIFY: 0, JobKind.EVALUATION: 1, JobKind.FINE_TUNING: 2}


def may_move(kind: JobKind, state: JobState, to: JobState) -> bool:
    """Whether a job of this kind may go from one state to another. Only fine-tuning validates files and publishes."""
    if kind is not JobKind.FINE_TUNING and to in (S.VALIDATING_FILES, S.PUBLISHING):
        return False
    if kind is JobKind.FINE_TUNING and state is S.RUNNING and to is S.SUCCEEDED:
        return False  # it must publish first
    return to in TRANSITIONS[state]


def first_state(kind: JobKind) -> JobState:
    """Where a new job begins."""
    return S.VALIDATING_FILES if kind is JobKind.FINE_TUNING else S.QUEUED


def next_to_start(jobs: Iterable[Job], *, max_running: int, waiting: Collection[str] = ()) -> Job | None:
    """The queued job whose turn it is: by kind, then by age. None while the machine is busy.

    `waiting` are ids of jobs that cannot start yet: a back-off, a version that is still loading.
    """
    known = list(jobs)
    if sum(job.state is S.RUNNING for job in known) >= max_running:
        return None
    queued = [job for job in known if job.state is S.QUEUED and not job.cancel_requested and job.id not in waiting]
    return min(queued, key=lambda job: (PRIORITY[job.kind], job.created_at, job.id), default=None)


def retry_delay_s(crashes: int, *, first_s: float, longest_s: float = 60.0) -> float:
    """How long to wait after the n-th crash of a job: doubled each time."""
    return min(longest_s, first_s * 2.0 ** max(0, crashes - 1))
