"""Which failures say that another start is of no use."""

from __future__ import annotations

import pytest

from gateway.engine.failures import Failures, told, waits_for
from gateway.registry.models import ReplicaState


def test_starts_that_end_before_they_serve_are_futile() -> None:
    seen = Failures().after("a", has_served=False, is_blamed=False).after("b", has_served=False, is_blamed=False)

    assert seen == Failures(in_a_row=2, futile_starts=2, last="b")


def test_a_start_for_which_an_adapter_is_blamed_is_not_and_neither_forgives_the_others() -> None:
    seen = Failures(2, 2, "a").after("b", has_served=False, is_blamed=True)

    assert seen == Failures(3, 2, "b")


@pytest.mark.parametrize("is_blamed", [True, False])
def test_an_engine_that_served_before_it_died_can_serve_again(is_blamed: bool) -> None:
    assert Failures(4, 2, "a").after("b", has_served=True, is_blamed=is_blamed) == Failures(5, 0, "b")


def test_serving_ends_the_row_of_futile_starts_and_keeps_the_count() -> None:
    assert Failures(3, 3, "a").once_served() == Failures(3, 0, "a")


@pytest.mark.parametrize(
    ("state", "is_tested", "goal"),
    [
        (ReplicaState.STARTING, False, "its process to answer"),
        (ReplicaState.TESTING, False, "its self-test"),
        (ReplicaState.TESTING, True, "its adapters"),
        (ReplicaState.READY, True, None),
        (ReplicaState.FAILED, False, None),
    ],
)
def test_says_what_a_start_waits_for(state: ReplicaState, is_tested: bool, goal: str | None) -> None:
    assert waits_for(state, is_tested=is_tested) == goal


def test_a_failure_is_a_sentence_with_reason_count_log_and_what_comes_next() -> None:
    text = told("out of memory", Failures(3, 3, "x"), log="logs/engine-0.log", pause_s=2)

    assert text == (
        "The engine failed (3 times in a row): out of memory\n  Its log is logs/engine-0.log; it is started again in 2 s."
    )
