"""What an engine should hold, and in which order it gets there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.models import Resident, Wanted
from gateway.engine.plan import (
    Action,
    Load,
    Observed,
    Probe,
    Refuse,
    RouteTargets,
    Unload,
    Withdraw,
    by_priority,
    plan,
)
from gateway.registry.models import AdapterVersion, ResidencyState, VersionState
from tests.factories import A_MOMENT, a_version

READY, LOADING = ResidencyState.READY, ResidencyState.LOADING
QUARANTINED, REFUSED = ResidencyState.QUARANTINED, ResidencyState.REFUSED


def a_wanted(number: int = 1) -> Wanted:
    version = a_version(version=number)
    return Wanted(version=version, directory=f"/artifacts/{version.digest}")


def rows(states: Mapping[str, ResidencyState]) -> dict[str, Resident]:
    return {name: Resident(engine_name=name, state=state) for name, state in states.items()}


def a_look(
    loaded: Collection[Wanted] = (),
    states: Mapping[str, ResidencyState] | None = None,
    *,
    paths: Mapping[str, str] | None = None,
    ever: Collection[str] = (),
    capacity: int = 31,
    leaving: Collection[str] = (),
    unreadable: Collection[str] = (),
) -> Observed:
    held = {one.engine_name: one.directory for one in loaded} | dict(paths or {})
    return Observed(held, rows(states or {}), {*held, *ever}, capacity, leaving, unreadable)


def test_loads_what_is_wanted_in_order_of_need() -> None:
    first, second = a_wanted(2), a_wanted(1)

    assert plan([first, second], a_look()) == [Load(first), Load(second)]


def test_does_nothing_when_everything_is_ready() -> None:
    one = a_wanted()

    assert plan([one], a_look([one], {one.engine_name: READY})) == []


@pytest.mark.parametrize("state", [None, LOADING, ResidencyState.PROBING])
def test_probes_what_is_loaded_and_not_known_to_be_right(state: ResidencyState | None) -> None:
    one = a_wanted()

    assert plan([one], a_look([one], {one.engine_name: state} if state else {})) == [Probe(one)]


@pytest.mark.invariant(5)
def test_loads_again_what_the_table_calls_ready_and_the_engine_does_not_hold() -> None:
    one = a_wanted()

    assert plan([one], a_look(states={one.engine_name: READY})) == [Load(one)]


@pytest.mark.invariant(2)
def test_right_name_at_another_path_is_withdrawn_before_it_is_unloaded() -> None:
    one = a_wanted()
    elsewhere = {one.engine_name: "/elsewhere"}

    assert plan([one], a_look(states={one.engine_name: READY}, paths=elsewhere)) == [Withdraw(one.engine_name)]
    assert plan([one], a_look(paths=elsewhere, leaving=[one.engine_name])) == []
    assert plan([one], a_look(paths=elsewhere)) == [Unload(one.engine_name)]


def test_strangers_are_unloaded() -> None:
    assert plan([], a_look(paths={"turnout-selftest.abc.0": "/selftest"})) == [Unload("turnout-selftest.abc.0")]


def test_what_is_no_longer_wanted_leaves_the_table_first() -> None:
    one = a_wanted()

    assert plan([], a_look([one], {one.engine_name: READY})) == [Withdraw(one.engine_name)]


def test_quarantined_is_unloaded_and_its_row_stays_for_people_to_see() -> None:
    one = a_wanted()

    assert plan([], a_look([one], {one.engine_name: QUARANTINED})) == [Unload(one.engine_name)]
    assert plan([], a_look(states={one.engine_name: QUARANTINED})) == []


@pytest.mark.parametrize("state", [QUARANTINED, REFUSED])
def test_a_load_that_was_refused_is_not_tried_again(state: ResidencyState) -> None:
    one = a_wanted()

    assert plan([one], a_look(states={one.engine_name: state})) == []


def damaged(one: Wanted) -> dict[str, Resident]:
    return {one.engine_name: Resident(engine_name=one.engine_name, state=REFUSED, code="digest_mismatch")}


def test_a_version_whose_files_were_damaged_is_looked_at_again() -> None:
    one = a_wanted()
    seen = replace(a_look(), rows=damaged(one))

    assert plan([one], replace(seen, unreadable=[one.engine_name])) == []
    assert plan([one], seen) == [Load(one)]


def test_a_version_that_waits_for_its_files_holds_up_no_other_and_keeps_its_place() -> None:
    waiting, second, third = a_wanted(1), a_wanted(2), a_wanted(3)
    seen = a_look(capacity=2, unreadable=[waiting.engine_name])

    assert plan([waiting, second, third], seen) == [Refuse(third), Load(second)]
    assert plan([waiting], a_look([waiting], unreadable=[waiting.engine_name])) == []


@pytest.mark.invariant(7)
def test_damaged_files_change_nothing_for_what_is_loaded() -> None:
    one = a_wanted()

    assert plan([one], a_look([one], {one.engine_name: READY}, unreadable=[one.engine_name])) == []


@pytest.mark.invariant(5)
def test_refuses_a_load_for_which_there_is_no_room() -> None:
    held, new = a_wanted(1), a_wanted(2)

    steps = plan([held, new], a_look([held], {held.engine_name: READY}, capacity=1))

    assert steps == [Refuse(new)]


@pytest.mark.invariant(5)
def test_what_was_unloaded_still_takes_room() -> None:
    new = a_wanted(3)

    assert plan([new], a_look(ever=["a.v1.x", "a.v2.x"], capacity=2)) == [Refuse(new)]
    assert plan([new], a_look(ever=["a.v1.x"], capacity=2)) == [Load(new)]


def test_loading_again_under_the_same_name_takes_no_new_room() -> None:
    one = a_wanted(1)

    assert plan([one], a_look(ever=[one.engine_name], capacity=1)) == [Load(one)]


@pytest.mark.invariant(5)
@given(
    wanted=st.lists(st.integers(1, 40), unique=True, max_size=40),
    loaded=st.sets(st.integers(1, 60), max_size=20),
    ghosts=st.sets(st.integers(61, 99), max_size=20),
    capacity=st.integers(1, 40),
)
def test_never_plans_more_names_than_the_engine_keeps(
    wanted: list[int], loaded: set[int], ghosts: set[int], capacity: int
) -> None:
    ever = {a_wanted(n).engine_name for n in loaded | ghosts}

    steps = plan([a_wanted(n) for n in wanted], a_look([a_wanted(n) for n in loaded], ever=ever, capacity=capacity))

    new = {step.wanted.engine_name for step in steps if isinstance(step, Load)} - ever
    assert len(ever | new) <= max(capacity, len(ever))


def replayed(wanted: list[Wanted], capacity: int) -> list[Action]:
    """Every step until nothing is left to do, on an engine that does as it is told."""
    paths: dict[str, str] = {}
    states: dict[str, ResidencyState] = {}
    ever: set[str] = set()
    done: list[Action] = []
    for _ in range(500):
        steps = plan(wanted, Observed(paths, rows(states), set(ever), capacity))
        if not steps:
            return done
        done.append(steps[0])
        match steps[0]:
            case Load(one):
                paths[one.engine_name] = one.directory
                states[one.engine_name] = READY
                ever.add(one.engine_name)
            case Probe(one):
                states[one.engine_name] = READY
            case Refuse(one):
                states[one.engine_name] = REFUSED
            case Withdraw(name):
                states.pop(name)
            case Unload(name):
                paths.pop(name)
    raise AssertionError("it never comes to rest")


@given(count=st.integers(0, 40), capacity=st.integers(1, 40))
def test_comes_to_rest_with_the_most_needed_resident(count: int, capacity: int) -> None:
    wanted = [a_wanted(n) for n in range(1, count + 1)]

    done = replayed(wanted, capacity)

    assert {step.wanted.version.version for step in done if isinstance(step, Load)} == set(
        range(1, min(count, capacity) + 1)
    )


# ---- Priority ----


def a_route(
    stable: str = "tiny", previous: str = "tiny", weighted: tuple[str, ...] = (), candidate: str | None = None
) -> RouteTargets:
    return RouteTargets(stable, previous, weighted, candidate)


def names(found: list[AdapterVersion]) -> list[str]:
    return [version.name for version in found]


def test_priority_follows_need() -> None:
    versions = [
        a_version(version=n, created_at=A_MOMENT + timedelta(minutes=n), job_id="job-1" if n in (6, 7) else None)
        for n in range(1, 10)
    ]
    route = a_route("support@1", "support@2", ("support@1", "support@3"), "support@4")

    found = by_priority(versions, [route], ["support@5"])

    assert names(found) == [f"support@{n}" for n in (1, 2, 3, 4, 5, 7, 6, 9, 8)]


def test_stables_of_all_routes_come_before_any_previous() -> None:
    versions = [a_version(adapter=name, version=n) for name in ("alpha", "beta") for n in (1, 2)]

    found = by_priority(versions, [a_route("alpha@2", "alpha@1"), a_route("beta@2", "beta@1")], [])

    assert names(found) == ["alpha@2", "beta@2", "alpha@1", "beta@1"]


@pytest.mark.invariant(4)
@pytest.mark.parametrize("state", [state for state in VersionState if state is not VersionState.VERIFIED])
def test_only_verified_versions_are_wanted_whatever_routes_say(state: VersionState) -> None:
    assert by_priority([a_version(state=state)], [a_route("support@1")], ["support@1"]) == []


# ---- What the guard of room is for ----


class LruEngine:
    """vLLM's adapter memory: the least recently used goes, whether or not anybody may still ask for it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.listed: dict[str, str] = {}
        self.memory: list[str] = []

    def load(self, one: Wanted) -> None:
        self.listed[one.engine_name] = one.directory
        self.memory = [*self.memory, one.engine_name][-self.size :]

    @property
    def gone(self) -> set[str]:
        """Listed, and read from disk in the middle of a step when it is asked for."""
        return set(self.listed) - set(self.memory)


def filled(capacity: int) -> LruEngine:
    """An engine that keeps four, after a controller that believes in `capacity` wanted six."""
    engine, ever, states = LruEngine(4), set[str](), dict[str, ResidencyState]()
    wanted = [a_wanted(number) for number in range(1, 7)]
    while steps := plan(wanted, Observed(engine.listed, rows(states), set(ever), capacity)):
        match steps[0]:
            case Load(one):
                engine.load(one)
                ever.add(one.engine_name)
                states[one.engine_name] = READY
            case Refuse(one):
                states[one.engine_name] = REFUSED
            case other:
                raise AssertionError(other)
    return engine


@pytest.mark.invariant(5)
def test_the_engines_own_eviction_never_happens() -> None:
    assert filled(capacity=4 - 1).gone == set()


@pytest.mark.mutant(5)
def test_without_the_limit_the_engine_evicts_what_traffic_needs() -> None:
    assert a_wanted(1).engine_name in filled(capacity=10**6).gone
