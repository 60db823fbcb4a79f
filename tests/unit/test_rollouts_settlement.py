"""What a journalled rollback means later: the same as it meant at once, and what was left stays left."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from gateway.errors import GatewayError
from gateway.rollouts.journal import Pointing, Rollback
from gateway.rollouts.pointers import Move, Past, Pointers, roll_back
from gateway.rollouts.settlement import settle
from gateway.routing.overlay import overlaid
from gateway.routing.snapshot import Snapshot, SnapshotRoute, SnapshotVersion

MOMENT = datetime(2026, 1, 2, tzinfo=UTC)


def a_world(choose: random.Random) -> tuple[Pointers, list[str], list[Past]]:
    """A route in a state that moves can lead to: `previous` names nothing that is marked."""
    versions = [
        Past(
            name=f"s@{number}",
            version=number,
            was_stable=choose.random() < 0.7,
            is_rolled_back=choose.random() < 0.2,
            is_servable=choose.random() < 0.9,
        )
        for number in range(1, choose.randint(2, 6))
    ]
    good = [
        "base",
        *(past.name for past in versions if past.was_stable and past.is_servable and not past.is_rolled_back),
    ]
    stable = choose.choice(good)
    candidate = choose.choice([None, *(past.name for past in versions if past.name != stable)])
    previous = choose.choice([name for name in good if name != stable] or ["base"])
    arms = [stable]
    if choose.random() < 0.5:
        arms = sorted({stable, *choose.sample(["base", *(past.name for past in versions if past.is_servable)], 1)})
    tried = tuple(arm for arm in arms if arm != stable)
    pointers = Pointers(base="base", stable=stable, previous=previous, candidate=candidate, tried=tried)
    return pointers, arms, versions


def a_record(pointers: Pointers, arms: list[str], move: Move, *, revision: int = 7) -> Rollback:
    after = move.pointers
    return Rollback(
        id="rollback-1",
        at=MOMENT,
        actor="key:a",
        reason="test",
        route="s",
        project_id="p",
        decided_on=revision,
        to=None,
        before=Pointing(
            stable=pointers.stable,
            previous=pointers.previous,
            candidate=pointers.candidate,
            variants=tuple((arm, 50) for arm in arms),
        ),
        after=Pointing(
            stable=after.stable,
            previous=after.previous,
            candidate=after.candidate,
            variants=((after.stable, 100),),
        ),
        left=tuple(name for name in dict.fromkeys((*move.marks, *move.withdrawn)) if name != "base"),
        marks=move.marks,
        unmarks=move.unmarks,
        withdrawn=move.withdrawn,
    )


@pytest.mark.parametrize("seed", range(40))
def test_told_of_an_unmoved_route_the_database_decides_as_the_gateway_did(seed: int) -> None:
    for each in range(20):
        _decides_alike(random.Random(seed * 1000 + each))


def _decides_alike(choose: random.Random) -> None:
    pointers, arms, versions = a_world(choose)
    to = choose.choice([None, None, "base", *(past.name for past in versions)])
    try:
        move = roll_back(pointers, versions, to=to, force=choose.random() < 0.5)
    except GatewayError:
        return

    found = settle(pointers, arms, versions, a_record(pointers, arms, move), is_unmoved=True)

    assert found.moves_traffic
    assert (found.pointers.stable, found.pointers.candidate) == (move.pointers.stable, move.pointers.candidate)
    assert found.marks == move.marks
    assert found.unmarks == move.unmarks
    assert found.pointers.previous == move.pointers.previous


@pytest.mark.parametrize("seed", range(40))
def test_whatever_moved_meanwhile_nothing_that_was_left_is_pointed_at(seed: int) -> None:
    for each in range(20):
        _stays_left(random.Random(seed * 1000 + each))


def _stays_left(choose: random.Random) -> None:
    pointers, arms, versions = a_world(choose)
    try:
        move = roll_back(pointers, versions, to=None, force=False)
    except GatewayError:
        return
    record = a_record(pointers, arms, move)
    names = ["base", *(past.name for past in versions)]
    later = replace(
        pointers, stable=choose.choice(names), previous=choose.choice(names), candidate=choose.choice(names)
    )
    shares = choose.sample(names, 2)

    found = settle(later, shares, versions, record, is_unmoved=False)

    points_at = {found.pointers.stable, found.pointers.previous, found.pointers.candidate}
    assert points_at.isdisjoint(record.left)
    if not found.moves_traffic:
        assert set(shares).isdisjoint(record.left)
        assert found.pointers.stable == later.stable
    again = settle(found.pointers, [found.pointers.stable], versions, record, is_unmoved=False)
    assert not again.moves_traffic
    assert again.pointers == found.pointers


def a_snapshot(stable: str, variants: tuple[tuple[str, int], ...], *, revision: int = 7) -> Snapshot:
    route = SnapshotRoute("s", revision, "salt", stable, "base", None, variants, "p", MOMENT)
    versions = {
        f"s@{n}": SnapshotVersion(f"s@{n}", "s", n, "d", f"s.v{n}", "verified", "p", frozenset(), True, False, MOMENT)
        for n in (1, 2, 3)
    }
    return Snapshot(1, routes={"s": route}, versions=versions)


def test_laid_over_a_table_it_moves_the_route_and_marks_what_was_left() -> None:
    pointers = Pointers(base="base", stable="s@2", previous="s@1")
    past = [Past(f"s@{n}", n, was_stable=True, is_rolled_back=False) for n in (1, 2)]
    record = a_record(pointers, ["s@2"], roll_back(pointers, past, to=None, force=False))

    found = overlaid(a_snapshot("s@2", (("s@2", 100),)), [record.override])

    route = found.routes["s"]
    assert (route.stable, route.previous, route.variants, route.revision) == ("s@1", "base", (("s@1", 100),), 8)
    assert [version.is_rolled_back for version in found.versions.values()] == [False, True, False]


def test_laid_over_a_table_that_moved_on_it_moves_nothing() -> None:
    pointers = Pointers(base="base", stable="s@2", previous="s@1")
    past = [Past(f"s@{n}", n, was_stable=True, is_rolled_back=False) for n in (1, 2)]
    record = a_record(pointers, ["s@2"], roll_back(pointers, past, to=None, force=False))
    moved_on = a_snapshot("s@3", (("s@3", 100),), revision=9)

    found = overlaid(moved_on, [record.override])
    elsewhere = overlaid(moved_on, [replace(record.override, project_id="another")])

    assert found.routes == moved_on.routes
    assert found.versions["s@2"].is_rolled_back
    assert elsewhere == moved_on


def test_laid_over_a_split_whose_stable_was_not_left_it_withdraws_the_arm_only() -> None:
    pointers = Pointers(base="base", stable="s@2", previous="s@1")
    past = [Past(f"s@{n}", n, was_stable=True, is_rolled_back=False) for n in (1, 2)]
    record = a_record(pointers, ["s@2"], roll_back(pointers, past, to=None, force=False))

    found = overlaid(a_snapshot("s@3", (("s@3", 50), ("s@2", 50)), revision=9), [record.override])

    assert (found.routes["s"].stable, found.routes["s"].variants) == ("s@3", (("s@3", 100),))
