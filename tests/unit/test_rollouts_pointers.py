"""Promote and roll back as pure decisions, by example and over random histories."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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

    def split(self, *arms: str, tries: tuple[str, ...] | None = None) -> History:
        self.pointers = replace(self.pointers, tried=module.tried_by(self.pointers.stable, arms, tries))
        return self

    def quarantine(self, name: str) -> History:
        self.past = [replace(past, is_servable=False) if past.name == name else past for past in self.past]
        return self

    def _take(self, move: Move) -> History:
        self.pointers = move.pointers
        self.past = [
            replace(
                past,
                was_stable=past.was_stable or past.name == move.pointers.stable,
                is_rolled_back=past.name in move.marks or (past.is_rolled_back and past.name != move.unmarks),
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
def test_a_rollback_withdraws_what_a_split_tries_and_leaves_stable_alone() -> None:
    history = History().promote("s@1").promote("s@2").split("s@2", "s@3").roll_back()

    assert history.shape == ("s@2", "s@1")
    assert history.marked == {"s@3"}
    assert history.roll_back().shape == ("s@1", BASE)


@pytest.mark.invariant(7)
def test_a_rollback_of_a_split_over_base_ends_it() -> None:
    history = History().split(BASE, "s@1").roll_back()

    assert history.shape == (BASE, BASE)
    assert history.marked == {"s@1"}


@pytest.mark.invariant(7)
@pytest.mark.parametrize("controls", [(BASE,), ("s@1",), (BASE, "s@1")])
def test_controls_in_a_split_are_not_what_a_rollback_takes_back(controls: tuple[str, ...]) -> None:
    history = History().promote("s@1").promote("s@2")
    alone, beside = history.split("s@2", *controls, tries=()).pointers, (*controls, "s@2", "s@3")

    assert roll_back(alone, history.past, to=None, force=False).pointers.stable == "s@1"
    history.split(*beside, tries=("s@3",)).roll_back()
    assert history.shape == ("s@2", "s@1")
    assert history.marked == {"s@3"}


@pytest.mark.invariant(7)
def test_base_is_tried_like_a_version_and_cannot_be_marked() -> None:
    history = History().promote("s@1").promote("s@2").split("s@2", BASE).roll_back()

    assert history.shape == ("s@2", "s@1")
    assert history.marked == set()


@pytest.mark.parametrize(("said", "code"), [(("s@1",), "trial_of_stable"), (("s@3",), "trial_without_share")])
def test_a_trial_is_of_arms_with_a_share_beside_stable(said: tuple[str, ...], code: str) -> None:
    with pytest.raises(Invalid) as caught:
        module.tried_by("s@1", ("s@1", "s@2"), said)

    assert caught.value.code == code


@pytest.mark.invariant(7)
def test_a_promotion_ends_the_trial() -> None:
    history = History().promote("s@1").split("s@1", "s@2").promote("s@2").roll_back()

    assert history.shape == ("s@1", BASE)
    assert history.marked == {"s@2"}


@pytest.mark.invariant(7)
def test_a_named_way_back_past_a_trial_condemns_stable_and_not_what_was_tried() -> None:
    history = History().promote("s@1").promote("s@2").promote("s@3").split("s@3", "s@4").roll_back(to="s@2")

    assert history.shape == ("s@2", "s@1")
    assert history.marked == {"s@3"}
    assert history.pointers.tried == ()


def test_an_older_version_that_was_never_stable_is_tried_like_a_new_one() -> None:
    history = History().promote("s@2").split("s@1", "s@2").roll_back()

    assert history.shape == ("s@2", BASE)
    assert history.marked == {"s@1"}


def test_a_named_target_leaves_stable_and_ends_the_trial() -> None:
    history = History().promote("s@1").promote("s@2").split("s@2", "s@3").roll_back(to=BASE)

    assert history.shape == (BASE, BASE)
    assert history.marked == {"s@2"}


@pytest.mark.invariant(7)
def test_a_way_back_that_is_withdrawn_is_none() -> None:
    history = History().promote("s@1").promote("s@2").promote("s@1", force=True).split("s@1", "s@2").roll_back()

    assert history.shape == ("s@1", BASE)
    assert history.marked == {"s@2"}


def test_naming_stable_withdraws_what_is_tried() -> None:
    history = History().promote("s@1").split("s@1", "s@2").roll_back(to="s@1")

    assert history.shape == ("s@1", BASE)
    assert history.marked == {"s@2"}


def test_a_split_over_a_stable_that_cannot_be_served_falls_back_further() -> None:
    history = History().promote("s@1").promote("s@2").split("s@2", "s@3").quarantine("s@2").roll_back()

    assert history.shape == ("s@1", BASE)
    assert history.marked == {"s@2", "s@3"}


def test_a_withdrawn_candidate_is_a_candidate_no_more() -> None:
    versions = History().past

    move = roll_back(replace(START, candidate="s@2", tried=("s@2",)), versions, to=None, force=False)

    assert move == Move(START, marks=("s@2",), withdrawn=("s@2",))


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
_moves = st.lists(st.tuples(st.sampled_from(["promote", "roll_back", "try"]), _targets, st.booleans()), max_size=25)


def moved(history: History, what: str, target: str | None, *, force: bool) -> None:
    """One random move; "try" puts an unmarked version beside stable, as a split would."""
    if what == "promote":
        history.promote(target, force=force)
    elif what == "roll_back":
        history.roll_back(target, force=force)
    elif target in {BASE} | {past.name for past in history.past} - history.marked:
        history.split(history.pointers.stable, str(target))


@pytest.mark.invariant(7)
@given(moves=_moves)
def test_whatever_the_history_the_way_back_is_sound(moves: list[tuple[str, str | None, bool]]) -> None:
    history = History()
    for what, target, force in moves:
        before, marked = history.pointers, history.marked
        tried = set(before.tried)
        try:
            moved(history, what, target, force=force)
        except GatewayError:
            assert history.pointers == before
            continue
        if what == "try":
            continue
        assert history.pointers.tried == ()
        if what == "roll_back" and tried and target in (None, before.stable):
            assert tried - {BASE} <= history.marked
            assert history.pointers == replace(before, previous=history.pointers.previous, tried=())
            assert before.previous in (history.pointers.previous, *tried)
            assert not {before.stable, history.pointers.previous} & history.marked
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
            assert history.marked - marked == {before.stable}
            if target is None:
                assert stable == before.previous


@given(moves=_moves)
def test_rolling_back_always_ends_at_base(moves: list[tuple[str, str | None, bool]]) -> None:
    history = History()
    for what, target, force in moves:
        try:
            moved(history, what, target, force=force)
        except GatewayError:
            continue

    steps = 0
    while history.pointers.stable != BASE:
        history.roll_back()
        steps += 1

    assert steps <= len(history.past) + 1


@pytest.mark.mutant(7)
def test_a_rollback_that_moved_stable_during_a_split_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tried_by", lambda *_: ())

    with pytest.raises(AssertionError):
        test_a_rollback_withdraws_what_a_split_tries_and_leaves_stable_alone()


@pytest.mark.mutant(7)
def test_a_rollback_that_forgot_its_marks_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(pointers: Pointers, versions: list[Past], **how: Any) -> Move:
        return replace(roll_back(pointers, versions, **how), marks=())

    monkeypatch.setattr(module, "roll_back", forgetful)

    with pytest.raises(AssertionError):
        test_rolling_back_twice_goes_back_two()
