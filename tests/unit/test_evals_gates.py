import re

import numpy as np
import pytest

from evals.gates import (
    ForgettingRule,
    TaskCounts,
    Verdict,
    combine,
    finer_margin,
    judge_forgetting,
    judge_improvement,
    judge_regression,
)
from evals.statistics import PairedCounts

RULE = ForgettingRule(margin=0.04, alpha=0.025, veto_drop=0.02)
P, F, U, E = Verdict.PASSED, Verdict.FAILED, Verdict.INCONCLUSIVE, Verdict.ERROR


def a_task(name: str = "facts", *, n: int = 200, worse: int = 2, better: int = 2, right: float = 0.85, chance: float = 0.5) -> TaskCounts:  # fmt: skip
    counts = PairedCounts(n=n, worse=worse, better=better)
    return TaskCounts(name=name, counts=counts, baseline_right=round(right * n), chance=chance)


@pytest.mark.parametrize(
    ("n", "worse", "better", "verdict"),
    [
        (200, 0, 190, P),
        (200, 10, 40, P),
        (200, 20, 26, U),
        (200, 0, 0, U),  # base and candidate equally hopeless: nothing was shown
        (200, 40, 10, F),
        (3, 0, 3, P),
        (2, 0, 1, U),
    ],
)
def test_improvement(n: int, worse: int, better: int, verdict: Verdict) -> None:
    found = judge_improvement(PairedCounts(n=n, worse=worse, better=better), min_gain=0.0, alpha=0.05)

    assert found.verdict is verdict


@pytest.mark.parametrize(
    ("n", "worse", "better", "verdict"),
    [
        (200, 0, 0, P),
        (200, 4, 4, P),
        (200, 190, 0, F),
        (200, 40, 10, F),
        (200, 12, 6, U),
        (50, 0, 0, U),  # nothing differs, and 50 items still cannot exclude a loss of 2 points
    ],
)
def test_regression(n: int, worse: int, better: int, verdict: Verdict) -> None:
    max_drop = 0.02 if n == 50 else 0.05

    found = judge_regression(PairedCounts(n=n, worse=worse, better=better), max_drop=max_drop, alpha=0.05)

    assert found.verdict is verdict


def test_reason_carries_every_number() -> None:
    found = judge_regression(PairedCounts(n=200, worse=12, better=6), max_drop=0.05, alpha=0.05)

    assert found.interval is not None
    numbers = (-0.03, found.interval.lower, found.interval.upper, -0.05)
    assert all(f"{number:+.3f}" in found.reason for number in numbers)
    assert "n=200" in found.reason
    assert "better 6" in found.reason
    assert "worse 12" in found.reason
    assert "alpha 0.05" in found.reason


def test_cannot_tell_says_how_many_items_would_settle_it() -> None:
    found = judge_regression(PairedCounts(n=200, worse=12, better=6), max_drop=0.05, alpha=0.05)

    match = re.search(r"cannot tell: about (\d+) items would settle it", found.reason)
    assert match is not None
    assert int(match[1]) > 200


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [([P, P], P), ([P, U], U), ([U, F, P], F), ([F, E], E), ([P, E, U], E), ([], U)],
)
def test_combining(verdicts: list[Verdict], expected: Verdict) -> None:
    assert combine(verdicts) is expected


def test_harmless_version_passes_forgetting() -> None:
    assert judge_forgetting([a_task("facts"), a_task("sums"), a_task("forms")], RULE).verdict is P


def test_average_loss_fails_forgetting() -> None:
    found = judge_forgetting([a_task(name, worse=24, better=4) for name in ("facts", "sums", "forms")], RULE)

    assert found.verdict is F


def test_one_ruined_task_vetoes_a_good_average() -> None:
    good = [a_task(f"task{i}", worse=1, better=3) for i in range(7)]

    found = judge_forgetting([*good, a_task("opposites", worse=30, better=2)], RULE)

    assert found.interval is not None
    assert found.interval.lower > -0.04
    assert found.verdict is F
    assert found.vetoes[0].startswith("veto by opposites: difference -0.140 beyond -0.020, worse 30, better 2, n=200")
    assert found.vetoes[0] in found.reason


def test_a_significant_but_small_drop_does_not_veto() -> None:
    found = judge_forgetting([a_task("big", n=5000, worse=95, better=20), a_task("other", n=5000)], RULE)

    assert found.vetoes == ()
    assert found.verdict is P


def test_a_large_but_uncertain_drop_does_not_veto() -> None:
    found = judge_forgetting([a_task("facts", n=40, worse=4, better=2), a_task("sums", n=40)], RULE)

    assert found.vetoes == ()


def test_too_few_items_cannot_tell() -> None:
    assert judge_forgetting([a_task(n=30, worse=1, better=1)], RULE).verdict is U


def test_task_at_chance_is_left_out_with_a_warning() -> None:
    found = judge_forgetting([a_task("facts"), a_task("guesses", right=0.55, worse=60, better=10)], RULE)

    assert found.verdict is P
    assert len(found.warnings) == 1
    assert "guesses left out: the base model scores 0.550" in found.warnings[0]


def test_nothing_but_chance_is_no_pass() -> None:
    found = judge_forgetting([a_task(right=0.5)], RULE)

    assert found.verdict is U
    assert "at chance on every task" in found.reason


def test_tasks_of_unequal_size_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many"):
        judge_forgetting([a_task(n=200), a_task("other", n=100)], RULE)


def test_finer_margin_names_its_price() -> None:
    text = finer_margin(PairedCounts(n=640, worse=30, better=34), margin=0.02, alpha=0.025)

    assert text.startswith("a margin of 2 points would need about ")
    assert "10.0 % discordance" in text


@pytest.mark.parametrize(("discordance", "published"), [(0.05, 0.38), (0.10, 0.23), (0.15, 0.18)])
def test_power_of_two_hundred_items_at_two_points_is_as_low_as_known(discordance: float, published: float) -> None:
    random = np.random.default_rng(11)
    drawn = random.multinomial(200, [discordance / 2, discordance / 2, 1 - discordance], size=4000)

    passed = [
        judge_regression(PairedCounts(n=200, worse=w, better=b), max_drop=0.02, alpha=0.05).verdict is P
        for w, b, _ in drawn.tolist()
    ]

    assert np.mean(passed) == pytest.approx(published, abs=0.05)
