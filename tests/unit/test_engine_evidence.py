"""When an engine's failure is held against a version."""

from __future__ import annotations

import math

import pytest

from gateway.engine.evidence import LATEST_PAUSE_S, MAX_DEATHS, MAX_FAILURES, Evidence, Kind, Suspicion

NAME = "support.v1.x"


def failed(
    evidence: Evidence, times: int, kind: Kind = "failure", *, is_alone: bool = True, has_neighbour: bool = True
) -> Suspicion:
    for _ in range(times):
        found = evidence.add(NAME, kind, is_alone=is_alone, has_neighbour=has_neighbour, now=0.0)
    return found


@pytest.mark.parametrize(("kind", "most"), [("failure", MAX_FAILURES), ("death", MAX_DEATHS)])
def test_only_what_repeats_is_proven(kind: Kind, most: int) -> None:
    assert most > 1
    assert not failed(Evidence(), most - 1, kind).is_proven
    assert failed(Evidence(), most, kind).is_proven


@pytest.mark.parametrize("kind", ["failure", "death"])
@pytest.mark.parametrize("missing", ["is_alone", "has_neighbour"])
def test_what_happened_in_company_or_without_a_neighbour_proves_nothing_and_pauses(kind: Kind, missing: str) -> None:
    evidence = Evidence()

    found = failed(evidence, 10, kind, **{missing: False})

    assert not found.is_proven
    assert NAME in evidence.paused(now=0.5)


def test_being_well_in_between_begins_anew() -> None:
    evidence = Evidence()
    failed(evidence, MAX_FAILURES - 1)

    evidence.acquit(NAME)

    assert not failed(evidence, 1).is_proven


def test_pauses_double_up_to_a_bound() -> None:
    pauses = [failed(Evidence(), times, has_neighbour=False).not_before for times in (1, 2, 3, 4, 99)]

    assert pauses == [1.0, 2.0, 4.0, 8.0, LATEST_PAUSE_S]


def test_after_a_death_the_pause_begins_when_the_engine_serves() -> None:
    """However long it takes to come up: else it would die of the same at each start."""
    evidence = Evidence()
    failed(evidence, 2, "death", has_neighbour=False)
    assert evidence.paused(now=1e9) == {NAME}

    evidence.begin_pauses(now=100.0)
    evidence.begin_pauses(now=101.0)

    assert math.isclose(evidence.by_name[NAME].not_before, 102.0)
    assert evidence.paused(now=101.9) == {NAME}
    assert evidence.paused(now=102.1) == set()


def test_a_version_that_nobody_wants_is_forgotten() -> None:
    evidence = Evidence()
    failed(evidence, MAX_FAILURES)

    evidence.keep_only({"another"})

    assert evidence.by_name == {}
