import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binom, binomtest, chi2, norm

from evals.statistics import (
    PairedCounts,
    _score,
    holm,
    items_for_margin,
    items_to_settle,
    mcnemar_mid_p,
    paired_counts,
    paired_interval,
    proportion_interval,
)


@st.composite
def counts(draw: st.DrawFn, largest: int = 400) -> PairedCounts:
    n = draw(st.integers(1, largest))
    worse = draw(st.integers(0, n))
    return PairedCounts(n=n, worse=worse, better=draw(st.integers(0, n - worse)))


def score_by_search(n: int, worse: int, better: int, difference: float) -> float:
    """Tango's statistic with the nuisance rate found by maximising the likelihood numerically."""

    def surprise(rate: float) -> float:
        cells = ((better, rate + difference), (worse, rate), (n - better - worse, 1 - 2 * rate - difference))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

    bounds = (max(0.0, -difference) + 1e-12, (1 - difference) / 2 - 1e-12)
    rate = minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    variance = n * (2 * rate + difference - difference**2)
    return float((better - worse - n * difference) / math.sqrt(variance))


@pytest.mark.parametrize(
    ("n", "worse", "better", "difference"),
    [
        (44, 1, 3, 0.05),
        (200, 10, 20, -0.02),
        (200, 30, 2, -0.1),
        (50, 4, 4, 0.08),
        (500, 25, 24, -0.04),
        (60, 40, 3, -0.3),
    ],
)
def test_score_statistic_agrees_with_a_numerical_likelihood(n: int, worse: int, better: int, difference: float) -> None:
    assert _score(n, worse, better, difference) == pytest.approx(
        score_by_search(n, worse, better, difference), rel=1e-4
    )


def test_interval_of_a_published_table() -> None:
    # Agresti & Min 2005, approval ratings: 1,600 people, 150 changed one way and 86 the other; Wald's interval is 0.0213 to 0.0587.
    found = paired_interval(PairedCounts(n=1600, worse=86, better=150), alpha=0.025)

    assert found.estimate == pytest.approx(0.04)
    assert found.lower == pytest.approx(0.0213, abs=1e-3)
    assert found.upper == pytest.approx(0.0587, abs=1e-3)


@seed(1)
@settings(max_examples=200, deadline=None)
@given(counts(), st.sampled_from([0.005, 0.025, 0.05, 0.2]))
def test_interval_is_never_of_zero_width_and_holds_its_estimate(found: PairedCounts, alpha: float) -> None:
    interval = paired_interval(found, alpha=alpha)

    assert -1 <= interval.lower <= interval.estimate <= interval.upper <= 1
    assert interval.upper - interval.lower > 1 / (found.n + 10) ** 1.5


@seed(2)
@settings(max_examples=200, deadline=None)
@given(counts())
def test_interval_excludes_zero_exactly_when_mcnemars_test_rejects(found: PairedCounts) -> None:
    interval = paired_interval(found, alpha=0.025)
    if found.worse == found.better:
        assert interval.lower < 0 < interval.upper
        return

    p = chi2.sf((found.worse - found.better) ** 2 / (found.worse + found.better), 1)  # McNemar 1947, uncorrected

    assert (interval.lower > 0 or interval.upper < 0) is bool(p < 0.05)


@seed(3)
@settings(max_examples=100, deadline=None)
@given(counts())
def test_interval_mirrors_when_the_two_swap(found: PairedCounts) -> None:
    swapped = PairedCounts(n=found.n, worse=found.better, better=found.worse)

    one, other = paired_interval(found, alpha=0.05), paired_interval(swapped, alpha=0.05)

    assert one.lower == pytest.approx(-other.upper, abs=1e-9)
    assert one.upper == pytest.approx(-other.lower, abs=1e-9)


def test_without_discordance_the_bounds_are_those_of_a_rare_event() -> None:
    z = norm.ppf(0.95)

    found = paired_interval(PairedCounts(n=50, worse=0, better=0), alpha=0.05)

    assert found.upper == pytest.approx(z * z / (50 + z * z), abs=1e-9)
    assert found.lower == pytest.approx(-found.upper)


def test_an_interval_of_nothing_is_everything() -> None:
    found = paired_interval(PairedCounts(n=0, worse=0, better=0), alpha=0.05)

    assert (found.lower, found.upper) == (-1.0, 1.0)


@pytest.mark.parametrize(("n", "worse", "better"), [(10, 10, 0), (10, 0, 10), (1, 1, 0), (3, 0, 0)])
def test_interval_of_extreme_tables_stays_in_range(n: int, worse: int, better: int) -> None:
    found = paired_interval(PairedCounts(n=n, worse=worse, better=better), alpha=0.05)

    assert -1 <= found.lower < found.upper <= 1


@pytest.mark.parametrize(
    ("n", "worse_rate", "better_rate"), [(60, 0.05, 0.05), (200, 0.02, 0.02), (200, 0.08, 0.04), (600, 0.05, 0.05), (600, 0.01, 0.05)]
)  # fmt: skip
def test_bounds_err_about_as_often_as_they_say(n: int, worse_rate: float, better_rate: float) -> None:
    random = np.random.default_rng(7)
    truth = better_rate - worse_rate
    drawn = random.multinomial(n, [worse_rate, better_rate, 1 - worse_rate - better_rate], size=4000)

    found = [paired_interval(PairedCounts(n=n, worse=w, better=b), alpha=0.05) for w, b, _ in drawn.tolist()]

    assert np.mean([i.lower > truth for i in found]) <= 0.065
    assert np.mean([i.upper < truth for i in found]) <= 0.065


@seed(4)
@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.data())
def test_proportion_interval_is_wilsons(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    lower, upper = binomtest(successes, n).proportion_ci(0.95, method="wilson")

    found = proportion_interval(successes, n, alpha=0.025)

    assert found.lower == pytest.approx(lower, abs=1e-9)
    assert found.upper == pytest.approx(upper, abs=1e-9)


@seed(5)
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mid_p_is_the_binomial_tail_with_half_of_the_observed(worse: int, better: int) -> None:
    n = worse + better
    expected = binom.sf(worse, n, 0.5) + binom.pmf(worse, n, 0.5) / 2 if n else 0.5

    assert mcnemar_mid_p(worse, better) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@seed(6)
@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1) | st.floats(0, 0.06), min_size=1, max_size=7))
def test_holm_is_the_closure_of_bonferroni(p_values: list[float]) -> None:
    # Marcus, Peritz & Gabriel 1976: reject where every intersection that holds the hypothesis is rejected at level alpha.
    hypotheses = range(len(p_values))
    groups = [group for size in range(1, len(p_values) + 1) for group in combinations(hypotheses, size)]
    kept = [group for group in groups if min(p_values[one] for one in group) > 0.05 / len(group)]

    expected = tuple(not any(one in group for group in kept) for one in hypotheses)

    assert holm(p_values, alpha=0.05) == expected


def test_holm_of_nothing_rejects_nothing() -> None:
    assert holm([], alpha=0.05) == ()


def test_counting_pairs() -> None:
    found = paired_counts([True, True, False, False, True], [True, False, True, False, False])

    assert found == PairedCounts(n=5, worse=2, better=1)
    assert found.difference == pytest.approx(-0.2)
    assert found.discordance == pytest.approx(0.6)


def test_pairs_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        paired_counts([True], [True, False])


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        PairedCounts(n=3, worse=2, better=2)


@pytest.mark.parametrize(("worse", "better"), [(5, 5), (8, 4), (2, 9)])
def test_items_to_settle_does_settle_when_rates_hold(worse: int, better: int) -> None:
    now = PairedCounts(n=100, worse=worse, better=better)

    needed = items_to_settle(now, limit=-0.02, alpha=0.05)

    assert needed is not None
    assert needed > now.n
    times = needed / now.n * 1.15  # "about": a normal approximation
    then = PairedCounts(n=round(100 * times), worse=round(worse * times), better=round(better * times))
    interval = paired_interval(then, alpha=0.05)
    assert interval.lower > -0.02 or interval.upper < -0.02


def test_no_number_of_items_settles_a_difference_on_the_limit() -> None:
    assert items_to_settle(PairedCounts(n=100, worse=6, better=4), limit=-0.02, alpha=0.05) is None


def test_finer_margins_need_more_items() -> None:
    needed = [items_for_margin(margin, 0.1, alpha=0.05) for margin in (0.04, 0.03, 0.02)]

    assert all(less < more for less, more in pairwise(needed))
    assert 1_900 < needed[-1] < 2_700
