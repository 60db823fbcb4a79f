"""The transition table of jobs, and whose turn it is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import product

import pytest

from gateway.jobs.models import EvaluationSpec, FineTuningSpec, Job, JobKind, JobSpec, JobState, VerifySpec
from gateway.jobs.state_machine import TRANSITIONS, first_state, may_move, next_to_start, retry_delay_s
from gateway.tables import FINAL_JOB_STATES

DIGEST = "a" * 64
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SPECS: dict[JobKind, JobSpec] = {
    JobKind.FINE_TUNING: FineTuningSpec(model="base", adapter="support", training_file="file-1"),
    JobKind.VERIFY: VerifySpec(target="support@1", digest=DIGEST),
    JobKind.EVALUATION: EvaluationSpec(
        target="support@1", digest=DIGEST, suite="emails", suite_digest=DIGEST, stable="base"
    ),
}


def a_job(kind: JobKind, state: JobState = JobState.QUEUED, *, age_s: int = 0, cancel_requested: bool = False) -> Job:
    return Job(
        id=f"{kind}-{state}-{age_s}",
        kind=kind,
        state=state,
        spec=SPECS[kind],
        cancel_requested=cancel_requested,
        created_at=NOON - timedelta(seconds=age_s),
        created_by="key:test",
        project_id="proj_default",
    )


def test_every_state_is_in_the_table() -> None:
    assert set(TRANSITIONS) == set(JobState)


@pytest.mark.parametrize(("state", "to"), [(s, t) for s, t in product(JobState, JobState) if s.is_final])
def test_a_final_state_is_never_left(state: JobState, to: JobState) -> None:
    assert not any(may_move(kind, state, to) for kind in JobKind)


@pytest.mark.parametrize("kind", JobKind)
def test_every_state_that_a_kind_can_reach_leads_to_an_end(kind: JobKind) -> None:
    reached, pending = set(), [first_state(kind)]
    while pending:
        state = pending.pop()
        if state not in reached:
            reached.add(state)
            pending += [to for to in JobState if may_move(kind, state, to)]

    assert {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED} <= reached
    for state in reached:
        assert state.is_final or any(may_move(kind, state, to) for to in (JobState.FAILED, JobState.CANCELLED))


def test_fine_tuning_publishes_before_it_succeeds() -> None:
    assert not may_move(JobKind.FINE_TUNING, JobState.RUNNING, JobState.SUCCEEDED)
    assert may_move(JobKind.FINE_TUNING, JobState.PUBLISHING, JobState.SUCCEEDED)


@pytest.mark.parametrize("kind", [JobKind.VERIFY, JobKind.EVALUATION])
def test_only_fine_tuning_publishes(kind: JobKind) -> None:
    assert not may_move(kind, JobState.RUNNING, JobState.PUBLISHING)
    assert first_state(kind) is JobState.QUEUED


def test_verification_goes_first_then_evaluation_then_the_oldest_training() -> None:
    old, young = a_job(JobKind.FINE_TUNING, age_s=90), a_job(JobKind.FINE_TUNING, age_s=10)
    verify, evaluation = a_job(JobKind.VERIFY), a_job(JobKind.EVALUATION, age_s=500)
    order = []
    jobs = [young, evaluation, old, verify]

    while jobs:
        job = next_to_start(jobs, max_running=1)
        assert job is not None
        order.append(job)
        jobs.remove(job)

    assert order == [verify, evaluation, old, young]


def test_one_at_a_time() -> None:
    running = a_job(JobKind.FINE_TUNING, JobState.RUNNING)

    assert next_to_start([running, a_job(JobKind.VERIFY)], max_running=1) is None
    assert next_to_start([running, a_job(JobKind.VERIFY)], max_running=2) == a_job(JobKind.VERIFY)


def test_publishing_holds_nobody_up() -> None:
    publishing = a_job(JobKind.FINE_TUNING, JobState.PUBLISHING)

    assert next_to_start([publishing, a_job(JobKind.VERIFY)], max_running=1) == a_job(JobKind.VERIFY)


def test_waiting_and_cancelled_jobs_are_passed_over() -> None:
    waiting, cancelled = a_job(JobKind.VERIFY, age_s=1), a_job(JobKind.VERIFY, age_s=2, cancel_requested=True)
    training = a_job(JobKind.FINE_TUNING)

    assert next_to_start([waiting, cancelled, training], max_running=1, waiting={waiting.id}) == training
    assert next_to_start([cancelled], max_running=1) is None


def test_back_off_doubles_up_to_a_minute() -> None:
    assert [retry_delay_s(crashes, first_s=1) for crashes in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert retry_delay_s(30, first_s=1) == 60


def test_what_queries_take_for_final_is_final() -> None:
    assert {str(state) for state in JobState if state.is_final} == set(FINAL_JOB_STATES)
