"""Intervals and tests for paired 0/1 outcomes. Pure; every formula names its source and is checked by simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Self

from pydantic import BaseModel, Field, model_validator

_NORMAL = NormalDist()
_MOST_ITEMS = 10_000_000  # beyond this "more items" is no advice


class PairedCounts(BaseModel, frozen=True):
    """The same n items answered by a baseline and a candidate."""

    n: int = Field(ge=0)
    worse: int = Field(ge=0, description="items that the baseline has right and the candidate wrong")
    better: int = Field(ge=0, description="items that the candidate has right and the baseline wrong")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.worse + self.better > self.n:
            raise ValueError(f"{self.worse} worse and {self.better} better do not fit into {self.n} items")
        return self

    @property
    def difference(self) -> float:
        """Candidate minus baseline, as a share of the items."""
        return (self.better - self.worse) / self.n if self.n else 0.0

    @property
    def discordance(self) -> float:
        """Share of items that exactly one of the two has right."""
        return (self.better + self.worse) / self.n if self.n else 0.0

    def __add__(self, other: PairedCounts) -> PairedCounts:
        """Both sets of items together."""
        return PairedCounts(n=self.n + other.n, worse=self.worse + other.worse, better=self.better + other.better)


class ScoreInterval(BaseModel, frozen=True):
    """An estimate between two one-sided bounds, each of which errs with probability `alpha`."""

    estimate: float
    lower: float
    upper: float
    alpha: float
    n: int


def paired_counts(baseline: Sequence[bool], candidate: Sequence[bool]) -> PairedCounts:
    """Count the items on which the two differ; position i is the same item in both."""
    pairs = list(zip(baseline, candidate, strict=True))
    return PairedCounts(
        n=len(pairs), worse=sum(b and not c for b, c in pairs), better=sum(c and not b for b, c in pairs)
    )


def paired_interval(counts: PairedCounts, *, alpha: float) -> ScoreInterval:
    """Score interval for a paired difference of proportions (Tango 1998, Statistics in Medicine 17:891-908).

    Its width is never zero: without a single discordant item the bounds are still z²/(n + z²) from zero.
    """
    lower, upper = _tango(counts.n, counts.worse, counts.better, alpha)
    return ScoreInterval(estimate=counts.difference, lower=lower, upper=upper, alpha=alpha, n=counts.n)


def proportion_interval(successes: int, n: int, *, alpha: float) -> ScoreInterval:
    """Wilson's score interval for one proportion (Wilson 1927, JASA 22:209-212)."""
    if n == 0:
        return ScoreInterval(estimate=0.0, lower=0.0, upper=1.0, alpha=alpha, n=0)
    z = _NORMAL.inv_cdf(1 - alpha)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    lower = 0.0 if successes == 0 else centre - half
    upper = 1.0 if successes == n else centre + half
    return ScoreInterval(estimate=share, lower=lower, upper=upper, alpha=alpha, n=n)


@lru_cache(maxsize=65536)
def mcnemar_mid_p(worse: int, better: int) -> float:
    """One-sided mid-p of harm: how surprising is this many worse, were worse and better equally likely?

    Fagerland, Lydersen & Laake 2013, BMC Medical Research Methodology 13:91.
    """
    n = worse + better
    if n == 0:
        return 0.5
    tail = sum(math.comb(n, k) for k in range(worse + 1, n + 1))
    return (2 * tail + math.comb(n, worse)) / (1 << (n + 1))


def holm(p_values: Sequence[float], *, alpha: float) -> tuple[bool, ...]:
    """Which hypotheses fall, with the family-wise error at most `alpha` (Holm 1979, Scand. J. Statistics 6:65-70)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - rank):
            break
        rejected[index] = True
    return tuple(rejected)


def items_to_settle(counts: PairedCounts, *, limit: float, alpha: float) -> int | None:
    """About how many items would put the interval on one side of `limit`, if the rates seen so far hold.

    None when the observed difference sits on the limit, so that no number of items would do.
    """
    discordance = max(counts.discordance, 1 / (counts.n + 1))
    distance = abs(counts.difference - limit)
    z = _NORMAL.inv_cdf(1 - alpha)
    if distance * distance * _MOST_ITEMS <= z * z * discordance:
        return None
    return max(counts.n + 1, math.ceil(z * z * (discordance - counts.difference**2) / distance**2))


def items_for_margin(margin: float, discordance: float, *, alpha: float, power: float = 0.9) -> int:
    """Items at which a harmless candidate passes a non-inferiority gate with this power (normal approximation)."""
    z = _NORMAL.inv_cdf(1 - alpha) + _NORMAL.inv_cdf(power)
    return math.ceil(z * z * max(discordance, 1e-3) / margin**2)


@lru_cache(maxsize=262144)
def _tango(n: int, worse: int, better: int, alpha: float) -> tuple[float, float]:
    if n == 0:
        return -1.0, 1.0
    z = _NORMAL.inv_cdf(1 - alpha)
    lower = -1.0 if worse == n else _root(n, worse, better, z, -1.0, (better - worse) / n)
    upper = 1.0 if better == n else _root(n, worse, better, -z, (better - worse) / n, 1.0)
    return lower, upper


def _root(n: int, worse: int, better: int, target: float, low: float, high: float) -> float:
    """Where the score statistic, which falls as the hypothetical difference grows, equals `target`."""
    for _ in range(60):
        middle = (low + high) / 2
        if _score(n, worse, better, middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _score(n: int, worse: int, better: int, difference: float) -> float:
    """Tango's score statistic at a hypothetical difference (candidate minus baseline)."""
    b = -better - worse + (2 * n - better + worse) * difference
    c = -worse * difference * (1 - difference)
    worse_rate = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * worse_rate + difference * (1 - difference))
    distance = better - worse - n * difference
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)
