"""Promote and roll back as pure decisions, by example and over random histories."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Conflict, GatewayError, Invalid, Refused
from gateway.rollouts import pointers as module
from gateway.rollouts.pointers import Move, Past, Pointers, promote, roll_back

BASE = "tiny"
START = Pointers(BASE, BASE, BASE)


class History:
    """A route and its versions, moved as the service moves them."""

    def __init__(self, versions: int = 4) -> None:
        self.pointers = START
        self.past = [
            Past(name=f"s@{number}", version=number, was_stable=False, is_rolled_back=False)
            for number in range(1, versions + 1)
        ]

    def promote(self, target: str | None, *, force: bool = False) -> History:
        return self._take(module.promote(self.pointers, target, self.past, force=force))

    def roll_back(self, to: str | None = None, *, force: bool = False) -> History:
        return self._take(module.roll_back(self.pointers, self.past, to=to, force=force))

    def quarantine(self, name: str) -> History:
        self.past = [replace(past, is_servable=False) if past.name == name else past for past in self.past]
        return self

    def _take(self, move: Move) -> History:
        self.pointers = move.pointers
        self.past = [
            replace(
                past,
                was_stable=past.was_stable or past.name == move.pointers.stable,
                is_rolled_back=past.name == move.marks or (past.is_rolled_back and past.name != move.unmarks),
            )
            for past in self.past
        ]
        return self

    @property
    def marked(self) -> set[str]:
        return {past.name for past in self.past if past.is_rolled_back}

    @property
    def shape(self) -> tuple[str, str]:
        return self.pointers.stable, self.pointers.previous


def test_promotion_keeps_the_way_back() -> None:
    history = History().promote("s@1").promote("s@2")

    assert history.shape == ("s@2", "s@1")


def test_promotion_without_a_target_takes_the_candidate_and_clears_it() -> None:
    move = promote(replace(START, candidate="s@1"), None, History().past, force=False)

    assert move.pointers == Pointers(BASE, "s@1", BASE, None)


def test_promotion_leaves_another_candidate_alone() -> None:
    move = promote(replace(START, candidate="s@2"), "s@1", History().past, force=False)

    assert move.pointers.candidate == "s@2"


def test_promotion_needs_something_to_promote() -> None:
    with pytest.raises(Conflict) as caught:
        History().promote(None)

    assert caught.value.code == "no_candidate"


@pytest.mark.parametrize("target", ["s@9", BASE, "", "other@1"])
def test_promotion_takes_versions_of_this_adapter_only(target: str) -> None:
    with pytest.raises((Invalid, Conflict)):
        History().promote(target)


def test_what_is_stable_is_not_promoted_again() -> None:
    with pytest.raises(Conflict) as caught:
        History().promote("s@1").promote("s@1")

    assert caught.value.code == "already_stable"


@pytest.mark.invariant(7)
def test_rollback_goes_to_previous_and_marks_what_it_leaves() -> None:
    history = History().promote("s@1").promote("s@2").roll_back()

    assert history.shape == ("s@1", BASE)
    assert history.marked == {"s@2"}


@pytest.mark.invariant(7)
def test_rolling_back_twice_goes_back_two() -> None:
    history = History().promote("s@1").promote("s@2").promote("s@3").roll_back().roll_back()

    assert history.shape == ("s@1", BASE)
    assert history.marked == {"s@2", "s@3"}


@pytest.mark.invariant(7)
def test_the_first_version_rolls_back_to_base() -> None:
    history = History().promote("s@1").roll_back()

    assert history.shape == (BASE, BASE)
    with pytest.raises(Conflict) as caught:
        history.roll_back()
    assert caught.value.code == "nothing_to_roll_back"


def test_previous_skips_what_was_rolled_back_or_never_stable() -> None:
    history = History(5).promote("s@1").promote("s@3").roll_back().promote("s@4").promote("s@5").roll_back()

    assert history.shape == ("s@4", "s@1")


def test_a_marked_version_comes_back_by_force_only_and_loses_its_mark() -> None:
    history = History().promote("s@1").promote("s@2").roll_back()
    with pytest.raises(Refused) as caught:
        history.promote("s@2")
    assert caught.value.code == "rolled_back"

    history.promote("s@2", force=True)

    assert history.shape == ("s@2", "s@1")
    assert history.marked == set()


def test_an_older_version_that_is_promoted_again_rolls_back_to_the_newer() -> None:
    history = History().promote("s@1").promote("s@2").promote("s@1").roll_back()

    assert history.shape == ("s@2", BASE)
    assert history.marked == {"s@1"}


def test_a_chosen_target_of_a_rollback() -> None:
    history = History().promote("s@1").promote("s@2").promote("s@3").roll_back("s@1")

    assert history.shape == ("s@1", BASE)
    assert history.marked == {"s@3"}
    assert History().promote("s@1").promote("s@2").roll_back(BASE).shape == (BASE, BASE)


@pytest.mark.parametrize(("to", "code"), [("s@3", "never_stable"), ("s@9", "not_a_version"), ("s@2", "already_stable")])
def test_a_rollback_goes_only_where_traffic_has_been(to: str, code: str) -> None:
    with pytest.raises(GatewayError) as caught:
        History().promote("s@1").promote("s@2").roll_back(to)

    assert caught.value.code == code


def test_a_rollback_to_a_marked_version_needs_force() -> None:
    history = History().promote("s@1").promote("s@2").promote("s@3").roll_back()
    with pytest.raises(Refused):
        history.promote("s@4").roll_back("s@3")

    history.roll_back("s@3", force=True)

    assert history.shape == ("s@3", "s@2")
    assert history.marked == {"s@4"}


def test_a_rollback_steps_over_what_was_quarantined_since() -> None:
    history = History().promote("s@1").promote("s@2").promote("s@3").quarantine("s@2").roll_back()

    assert history.shape == ("s@1", BASE)
    with pytest.raises(Refused):
        history.promote("s@4").roll_back("s@2")


def test_a_rollback_takes_the_version_it_leaves_off_the_candidates() -> None:
    history = History().promote("s@1").promote("s@2")
    history.pointers = replace(history.pointers, candidate="s@2")

    assert history.roll_back().pointers.candidate is None


_targets = st.sampled_from([None, BASE, "s@1", "s@2", "s@3", "s@4", "s@9"])
_moves = st.lists(st.tuples(st.sampled_from(["promote", "roll_back"]), _targets, st.booleans()), max_size=25)


@pytest.mark.invariant(7)
@given(moves=_moves)
def test_whatever_the_history_the_way_back_is_sound(moves: list[tuple[str, str | None, bool]]) -> None:
    history = History()
    for what, target, force in moves:
        before, marked = history.pointers, history.marked
        try:
            history.promote(target, force=force) if what == "promote" else history.roll_back(target, force=force)
        except GatewayError:
            assert history.pointers == before
            continue

        names = {past.name: past for past in history.past}
        stable, previous = history.shape
        assert stable != before.stable
        assert stable == BASE or names[stable].was_stable
        assert stable not in history.marked
        assert previous not in history.marked
        assert previous == BASE or names[previous].was_stable
        assert previous != stable or stable == BASE
        if stable in marked:
            assert force
        if what == "promote":
            assert previous == before.stable
        else:
            assert before.stable in history.marked
            if target is None:
                assert stable == before.previous


@given(moves=_moves)
def test_rolling_back_always_ends_at_base(moves: list[tuple[str, str | None, bool]]) -> None:
    history = History()
    for what, target, force in moves:
        try:
            history.promote(target, force=force) if what == "promote" else history.roll_back(target, force=force)
        except GatewayError:
            continue

    steps = 0
    while history.pointers.stable != BASE:
        history.roll_back()
        steps += 1

    assert steps <= len(history.past)


@pytest.mark.mutant(7)
def test_a_rollback_that_forgot_its_marks_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(pointers: Pointers, versions: list[Past], *, to: str | None, force: bool) -> Move:
        return replace(roll_back(pointers, versions, to=to, force=force), marks=None)

    monkeypatch.setattr(module, "roll_back", forgetful)

    with pytest.raises(AssertionError):
        test_rolling_back_twice_goes_back_two()
