"""What an engine should hold, and in which order it gets there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
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
    is_restored,
    plan,
    touch_order,
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
    capacity: int = 31,
    **more: Collection[str],
) -> Observed:
    held = {one.engine_name: one.directory for one in loaded} | dict(paths or {})
    return Observed(held, rows(states or {}), capacity, **more)


def ready(*held: Wanted, capacity: int = 31, **more: Collection[str]) -> Observed:
    """All of these loaded, and the gateways know it."""
    return a_look(held, {one.engine_name: READY for one in held}, paths=None, capacity=capacity, **more)


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


def test_a_load_that_was_quarantined_is_not_tried_again() -> None:
    one = a_wanted()

    assert plan([one], a_look(states={one.engine_name: QUARANTINED})) == []


@pytest.mark.parametrize("state", [REFUSED, ResidencyState.WAITING])
def test_what_failed_a_moment_ago_is_brought_when_its_pause_is_over(state: ResidencyState) -> None:
    one = a_wanted()
    seen = a_look(states={one.engine_name: state})

    assert plan([one], replace(seen, put_off=[one.engine_name])) == []
    assert plan([one], seen) == [Load(one)]


def test_a_version_that_waits_holds_up_no_other_and_keeps_its_place() -> None:
    waiting, second, third = a_wanted(1), a_wanted(2), a_wanted(3)
    seen = a_look(capacity=2, put_off=[waiting.engine_name])

    assert plan([waiting, second, third], seen) == [Refuse(third), Load(second)]
    assert plan([waiting], a_look([waiting], put_off=[waiting.engine_name])) == []


def test_a_version_that_failed_comes_after_the_others() -> None:
    failed, second = a_wanted(1), a_wanted(2)

    assert plan([failed, second], a_look(suspects=[failed.engine_name])) == [Load(second), Load(failed)]


@pytest.mark.invariant(7)
def test_damaged_files_change_nothing_for_what_is_loaded() -> None:
    one = a_wanted()

    assert plan([one], ready(one, put_off=[one.engine_name])) == []


# ---- Room ----


@pytest.mark.invariant(5)
def test_refuses_a_load_for_which_there_is_no_room_once() -> None:
    held, new = a_wanted(1), a_wanted(2)
    told = replace(ready(held, capacity=1), rows=rows({held.engine_name: READY}) | no_room(new))

    assert plan([held, new], ready(held, capacity=1)) == [Refuse(new)]
    assert plan([held, new], told) == []


def no_room(one: Wanted) -> dict[str, Resident]:
    return {one.engine_name: Resident(engine_name=one.engine_name, state=REFUSED, code="capacity_exhausted")}


def test_what_was_refused_for_room_takes_the_place_of_the_least_needed_when_its_rank_rises() -> None:
    first, second, old = a_wanted(1), a_wanted(2), a_wanted(3)
    name = second.engine_name
    seen = ready(first, second, capacity=2)
    seen = replace(seen, rows=dict(seen.rows) | no_room(old))
    risen = [old, first, second]
    without_row = replace(seen, rows={key: row for key, row in seen.rows.items() if key != name})

    assert plan([first, second, old], seen) == []
    assert plan(risen, seen) == [Withdraw(name)]
    assert Unload(name) not in plan(risen, replace(without_row, leaving=[name]))
    assert Unload(name) not in plan(risen, replace(without_row, in_use=[name]))
    assert plan(risen, without_row) == [Unload(name), Refuse(second)][:1]
    gone = replace(without_row, loaded={first.engine_name: first.directory})
    assert plan(risen, gone) == [Refuse(second), Load(old)]


def test_what_gives_way_stays_when_its_place_is_no_longer_needed() -> None:
    first, second = a_wanted(1), a_wanted(2)
    withdrawn = a_look([first, second], {first.engine_name: READY}, capacity=2, leaving=[second.engine_name])

    assert plan([first, second], withdrawn) == [Probe(second)]


def test_what_is_loaded_stays_while_there_is_room() -> None:
    first, second = a_wanted(1), a_wanted(2)

    assert plan([second, first], ready(first, second, capacity=2)) == []


def test_a_stranger_goes_before_any_version_does() -> None:
    first, second = a_wanted(1), a_wanted(2)
    seen = replace(ready(first, capacity=2), loaded={first.engine_name: first.directory, "stranger": "/x"})

    assert plan([second, first], seen) == [Unload("stranger")]


@pytest.mark.invariant(7)
@settings(deadline=None)
@given(
    ranked=st.lists(st.integers(1, 12), unique=True, min_size=1, max_size=12),
    loaded=st.sets(st.integers(1, 12)),
    capacity=st.integers(1, 12),
)
def test_only_the_least_needed_gives_way(ranked: list[int], loaded: set[int], capacity: int) -> None:
    held = [a_wanted(n) for n in ranked if n in loaded][:capacity]
    desired = [a_wanted(n) for n in ranked]

    steps = plan(desired, ready(*held, capacity=capacity))

    leaving = {step.engine_name for step in steps if isinstance(step, Withdraw | Unload)}
    assert not leaving & {one.engine_name for one in desired[:capacity]}
    loads = [step for step in steps if isinstance(step, Load)]
    assert len(held) + len(loads) <= capacity


def test_a_load_into_a_full_memory_touches_the_most_needed_last() -> None:
    first, second = a_wanted(1), a_wanted(2)

    assert touch_order([first, second], [first.engine_name, "stranger", second.engine_name]) == [
        "stranger",
        second.engine_name,
        first.engine_name,
    ]


# ---- When traffic may come ----


def needed(number: int) -> Wanted:
    return a_wanted(number).model_copy(update={"is_needed": True})


def test_traffic_waits_for_what_routes_need_and_not_for_the_rest() -> None:
    live, rest = needed(1), a_wanted(2)

    assert not is_restored([live, rest], ready(rest))
    assert is_restored([live, rest], ready(live))


@pytest.mark.parametrize("why", ["put_off", "suspects", "no room", "condemned"])
def test_traffic_does_not_wait_for_what_will_not_come(why: str) -> None:
    live, other = needed(1), needed(2)
    name = other.engine_name
    seen = {
        "put_off": ready(live, put_off=[name]),
        "suspects": ready(live, suspects=[name]),
        "no room": ready(live, capacity=1),
        "condemned": a_look([live], {live.engine_name: READY, name: QUARANTINED}),
    }[why]

    assert is_restored([live, other], seen)


# ---- What the guards of room are for ----


class LruEngine:
    """vLLM's adapter memory: the least recently used goes, whether or not anybody may still ask for it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.listed: dict[str, str] = {}
        self.numbers: dict[str, int] = {}
        self.memory: list[int] = []
        self.loads = 0

    def load(self, one: Wanted) -> None:
        self.loads += 1
        self.listed[one.engine_name], self.numbers[one.engine_name] = one.directory, self.loads
        self.memory = [*self.memory, self.loads][-self.size :]

    def use(self, name: str) -> None:
        number = self.numbers[name]
        self.memory = [*(each for each in self.memory if each != number), number][-self.size :]

    @property
    def gone(self) -> set[str]:
        """Listed, and read from disk in the middle of a step when it is asked for."""
        return {name for name in self.listed if self.numbers[name] not in self.memory}


def driven(
    rankings: list[list[int]],
    *,
    size: int,
    capacity: int,
    touches: bool = True,
    used: Mapping[int, list[int]] | None = None,
) -> tuple[LruEngine, set[str]]:
    """An engine after a controller brought it through these rankings; and what its memory ever lacked."""
    engine, states, lacked = LruEngine(size), dict[str, ResidencyState](), set[str]()
    for turn, ranking in enumerate(rankings):
        desired = [a_wanted(number) for number in ranking]
        for number in (used or {}).get(turn, []):
            if a_wanted(number).engine_name in engine.listed:
                engine.use(a_wanted(number).engine_name)
        for _ in range(500):
            found = rows(states)
            found |= {
                n: r.model_copy(update={"code": "capacity_exhausted"}) for n, r in found.items() if r.state is REFUSED
            }
            steps = plan(desired, Observed(dict(engine.listed), found, capacity))
            if not steps:
                break
            act(engine, steps[0], states, desired if touches else [])
            lacked |= engine.gone
        else:
            raise AssertionError("it never comes to rest")
        assert {n for n, state in states.items() if state is READY} == {
            one.engine_name for one in desired[:capacity]
        }, ranking
    return engine, lacked


def act(engine: LruEngine, step: Action, states: dict[str, ResidencyState], desired: list[Wanted]) -> None:
    match step:
        case Load(one):
            if engine.loads >= engine.size and desired:
                for name in touch_order(desired, engine.listed):
                    engine.use(name)
            engine.load(one)
            states[one.engine_name] = READY
        case Probe(one):
            states[one.engine_name] = READY
        case Refuse(one):
            states[one.engine_name] = REFUSED
        case Withdraw(name):
            states.pop(name)
        case Unload(name):
            del engine.listed[name]


@settings(deadline=None)
@given(count=st.integers(0, 24), capacity=st.integers(1, 24))
def test_comes_to_rest_with_the_most_needed_resident(count: int, capacity: int) -> None:
    wanted = list(range(1, count + 1))

    engine, lacked = driven([wanted], size=capacity + 1, capacity=capacity)

    assert (len(engine.listed), lacked) == (min(count, capacity), set())


RANKINGS = st.lists(st.permutations(range(1, 8)), min_size=1, max_size=8)


@pytest.mark.invariant(5)
@settings(deadline=None)
@given(rankings=RANKINGS, capacity=st.integers(1, 5), data=st.data())
def test_the_engines_own_eviction_never_takes_what_may_be_asked_for(
    rankings: list[list[int]], capacity: int, data: st.DataObject
) -> None:
    used = {turn: data.draw(st.lists(st.integers(1, 7), max_size=4)) for turn in range(len(rankings))}

    _, lacked = driven(rankings, size=capacity + 1, capacity=capacity, used=used)

    assert lacked == set()


TURNOVER = [[1, 2, 3], [1, 4, 5], [1, 6, 7], [1, 2, 3]]


@pytest.mark.mutant(5)
def test_without_touches_the_engine_evicts_what_traffic_needs() -> None:
    _, lacked = driven(TURNOVER, size=4, capacity=3, touches=False)

    assert a_wanted(1).engine_name in lacked


@pytest.mark.mutant(5)
def test_without_the_limit_the_engine_evicts_what_traffic_needs() -> None:
    _, lacked = driven([[1, 2, 3, 4, 5, 6]], size=4, capacity=10**6)

    assert lacked


# ---- Priority ----


def a_route(
    stable: str = "tiny", previous: str = "tiny", weighted: tuple[str, ...] = (), candidate: str | None = None
) -> RouteTargets:
    return RouteTargets(stable, previous, weighted, candidate)


def names(found: list[AdapterVersion]) -> list[str]:
    return [version.name for version in found]


def test_priority_follows_need() -> None:
    versions = [a_version(version=n, created_at=A_MOMENT + timedelta(minutes=n), job_id=None) for n in range(1, 10)]
    route = a_route("support@1", "support@2", ("support@1", "support@3"), "support@4")

    found = by_priority(versions, [route], ["support@5"], pinned=["support@6", "support@1"])

    assert names(found) == [f"support@{n}" for n in (1, 3, 2, 4, 6, 5, 9, 8, 7)]


def test_the_others_follow_their_last_use_and_a_publication_is_one() -> None:
    def at(minutes: int) -> datetime:
        return A_MOMENT + timedelta(minutes=minutes)

    old = a_version(version=1, created_at=at(0), used_at=at(30))
    unused, new = a_version(version=2, created_at=at(10)), a_version(version=3, created_at=at(40))

    assert names(by_priority([old, unused, new], [], [])) == ["support@3", "support@1", "support@2"]


def test_a_retired_version_is_not_wanted_whatever_routes_say() -> None:
    retired = a_version(retired_at=A_MOMENT)

    assert by_priority([retired], [a_route("support@1")], ["support@1"], ["support@1"]) == []


def test_stables_of_all_routes_come_before_any_previous() -> None:
    versions = [a_version(adapter=name, version=n) for name in ("alpha", "beta") for n in (1, 2)]

    found = by_priority(versions, [a_route("alpha@2", "alpha@1"), a_route("beta@2", "beta@1")], [])

    assert names(found) == ["alpha@2", "beta@2", "alpha@1", "beta@1"]


@pytest.mark.invariant(4)
@pytest.mark.parametrize("state", [state for state in VersionState if state is not VersionState.VERIFIED])
def test_only_verified_versions_are_wanted_whatever_routes_say(state: VersionState) -> None:
    assert by_priority([a_version(state=state)], [a_route("support@1")], ["support@1"]) == []
