"""Assignment: pure, in the shares that were asked for, and moving no more units than the weights make it."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from hashlib import blake2b

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.routing import assignment
from gateway.routing.assignment import assign

UNITS = [f"unit-{number}" for number in range(20_000)]
_names = st.text(min_size=1, max_size=12)
_weights = st.lists(st.integers(min_value=0, max_value=10_000), min_size=1, max_size=6).filter(any)


def shares(variants: list[tuple[str, int]], *, salt: str = "salt") -> dict[str, float]:
    counts = Counter(assign(salt, unit, variants) for unit in UNITS)
    return {target: count / len(UNITS) for target, count in counts.items()}


@pytest.mark.parametrize(
    "variants",
    [
        [("a", 50), ("b", 50)],
        [("a", 1), ("b", 99)],
        [("a", 20), ("b", 30), ("c", 50)],
        [("a", 1), ("b", 1), ("c", 1), ("d", 1)],
        [("a", 10_000), ("b", 1)],
    ],
)
def test_shares_are_those_of_the_weights(variants: list[tuple[str, int]]) -> None:
    found = shares(variants)

    total = sum(weight for _, weight in variants)
    for target, weight in variants:
        expected = weight / total
        error = math.sqrt(expected * (1 - expected) / len(UNITS))
        assert abs(found.get(target, 0) - expected) < 4.5 * error, (target, found)


def test_two_salts_assign_independently() -> None:
    variants = [("a", 50), ("b", 50)]

    both = sum(assign("one", unit, variants) == assign("two", unit, variants) for unit in UNITS)

    assert abs(both / len(UNITS) - 0.5) < 4.5 * 0.5 / math.sqrt(len(UNITS))


@pytest.mark.invariant(8)
@given(salt=_names, unit=_names, weights=_weights, shuffled=st.randoms())
def test_the_same_key_gets_the_same_arm_in_whatever_order_arms_are_named(
    salt: str, unit: str, weights: list[int], shuffled: object
) -> None:
    variants = [(f"v{place}", weight) for place, weight in enumerate(weights)]
    mixed = list(variants)
    shuffled.shuffle(mixed)  # type: ignore[attr-defined]

    chosen = assign(salt, unit, variants)

    assert chosen == assign(salt, unit, variants) == assign(salt, unit, mixed)
    assert dict(variants)[chosen] > 0


@pytest.mark.invariant(8)
def test_another_process_assigns_alike() -> None:
    code = "from gateway.routing.assignment import assign; print(*(assign('s', f'u{n}', [('a', 3), ('b', 7)]) for n in range(200)))"

    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"}
    )

    assert other.stdout.split() == [assign("s", f"u{number}", [("a", 3), ("b", 7)]) for number in range(200)]


@pytest.mark.invariant(8)
@given(unit=_names, weights=_weights, place=st.integers(min_value=0, max_value=5), weight=st.integers(0, 10_000))
def test_changing_one_weight_moves_units_to_or_from_that_arm_only(
    unit: str, weights: list[int], place: int, weight: int
) -> None:
    variants = [(f"v{number}", value) for number, value in enumerate(weights)]
    changed_place = place % len(variants)
    changed = variants[changed_place][0]
    after = [*variants[:changed_place], (changed, weight), *variants[changed_place + 1 :]]
    if not any(value for _, value in after):
        return

    old, new = assign("salt", unit, variants), assign("salt", unit, after)

    assert old == new or changed in (old, new)
    if weight >= variants[changed_place][1]:
        assert old == new or new == changed


@pytest.mark.mutant(8)
def test_an_assignment_that_draws_anew_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(range(10**9))

    def another(data: bytes, *, digest_size: int) -> object:
        return blake2b(data + str(next(drawn)).encode(), digest_size=digest_size)

    monkeypatch.setattr(assignment, "blake2b", another)

    with pytest.raises(AssertionError):
        test_another_process_assigns_alike()


def test_adding_an_arm_takes_only_its_share() -> None:
    before, after = [("a", 50), ("b", 50)], [("a", 50), ("b", 50), ("c", 25)]

    moved = [(assign("salt", unit, before), assign("salt", unit, after)) for unit in UNITS]

    assert {new for old, new in moved if old != new} == {"c"}
    assert abs(sum(old != new for old, new in moved) / len(UNITS) - 0.2) < 0.015


@pytest.mark.parametrize("variants", [[], [("a", 0)], [("a", 0), ("b", 0)]])
def test_without_a_positive_weight_nothing_is_assigned(variants: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError, match="positive weight"):
        assign("salt", "unit", variants)
