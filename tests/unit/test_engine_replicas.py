"""The life of a replica, decision by decision."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.engine.lifecycle import MAX_BACKOFF_S, Decision, Sight, backoff_s, decide
from gateway.registry.models import ReplicaState
from gateway.settings import EngineSettings

ENGINE = EngineSettings(start_timeout_s=300, hang_timeout_s=10, first_work_timeout_s=120)


def a_sight(state: ReplicaState, **fields: Any) -> Sight:
    return Sight(state=state, **({"process": "running", "health": "healthy"} | fields))


@pytest.mark.parametrize("state", [ReplicaState.STOPPED, ReplicaState.FAILED])
def test_starts_when_the_pause_is_over(state: ReplicaState) -> None:
    assert decide(a_sight(state, process="absent"), ENGINE).step == "start"
    assert decide(a_sight(state, process="absent", wait_s=0.1), ENGINE).step == "wait"


def test_waits_while_it_starts() -> None:
    assert decide(a_sight(ReplicaState.STARTING, health="silent", age_s=299), ENGINE).step == "wait"


def test_tests_as_soon_as_it_is_healthy() -> None:
    assert decide(a_sight(ReplicaState.STARTING), ENGINE).step == "test"


def test_gives_up_a_start_that_takes_too_long() -> None:
    found = decide(a_sight(ReplicaState.STARTING, health="silent", age_s=301), ENGINE)

    assert found == Decision("fail", "not healthy 301 s after its start, and idle")


def test_a_start_that_computes_or_reads_is_never_given_up_for_time_alone() -> None:
    assert decide(a_sight(ReplicaState.STARTING, health="silent", age_s=3_000, is_busy=True), ENGINE).step == "wait"


@pytest.mark.parametrize("state", [ReplicaState.STARTING, ReplicaState.TESTING, ReplicaState.READY])
def test_fails_when_the_process_is_gone(state: ReplicaState) -> None:
    found = decide(a_sight(state, process="exited", exit_code=-9, is_tested=True, is_restored=True), ENGINE)

    assert found == Decision("fail", "the engine's process ended with -9")


@pytest.mark.invariant(3)
@pytest.mark.parametrize(("is_tested", "is_restored"), [(False, False), (False, True), (True, False)])
def test_serves_nothing_before_self_test_and_restoration(is_tested: bool, is_restored: bool) -> None:
    found = decide(a_sight(ReplicaState.TESTING, is_tested=is_tested, is_restored=is_restored), ENGINE)

    assert found.step == "wait"


def test_serves_when_tested_and_restored() -> None:
    assert decide(a_sight(ReplicaState.TESTING, is_tested=True, is_restored=True), ENGINE).step == "serve"


@pytest.mark.invariant(3)
@pytest.mark.parametrize("state", [ReplicaState.TESTING, ReplicaState.READY])
def test_a_fault_restarts_it_whatever_else_is_well(state: ReplicaState) -> None:
    found = decide(a_sight(state, is_tested=True, is_restored=True, fault="self_test_failed: leaks"), ENGINE)

    assert found == Decision("fail", "self_test_failed: leaks")


@pytest.mark.parametrize("state", [ReplicaState.TESTING, ReplicaState.READY])
def test_a_dead_core_is_believed_at_once(state: ReplicaState) -> None:
    assert decide(a_sight(state, health="dead"), ENGINE).step == "fail"


@pytest.mark.parametrize("state", [ReplicaState.TESTING, ReplicaState.READY])
def test_silence_is_a_hang_only_when_it_lasts(state: ReplicaState) -> None:
    assert decide(a_sight(state, health="silent", silent_s=9.9), ENGINE).step == "wait"
    assert decide(a_sight(state, health="silent", silent_s=10.1), ENGINE).step == "fail"
    assert decide(a_sight(state, health="healthy", silent_s=10.1), ENGINE).step == "fail"


@pytest.mark.parametrize("state", [ReplicaState.TESTING, ReplicaState.READY])
def test_the_first_work_after_a_start_has_a_longer_allowance(state: ReplicaState) -> None:
    assert decide(a_sight(state, silent_s=119.9, has_worked=False), ENGINE).step == "wait"
    assert decide(a_sight(state, silent_s=120.1, has_worked=False), ENGINE).step == "fail"


@pytest.mark.parametrize("state", [ReplicaState.TESTING, ReplicaState.READY])
def test_an_engine_that_computes_is_slow_until_it_has_computed_for_minutes_without_a_token(state: ReplicaState) -> None:
    assert decide(a_sight(state, silent_s=0.0, fruitless_s=299), ENGINE).step == "wait"
    assert decide(a_sight(state, silent_s=0.0, fruitless_s=301), ENGINE) == Decision(
        "fail", "the engine computed for 301 s without a token though it was asked for one"
    )


def test_the_pause_grows_to_a_cap_and_a_first_death_costs_none() -> None:
    assert [backoff_s(n) for n in (0, 1, 2, 3, 4)] == [0, 0, 1, 2, 4]
    assert backoff_s(1_000) == MAX_BACKOFF_S
