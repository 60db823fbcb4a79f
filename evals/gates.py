"""From paired counts to a verdict. Pure; a reason carries every number that was used, and "cannot tell" is no pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

from pydantic import BaseModel, Field

from .statistics import (
    PairedCounts,
    ScoreInterval,
    holm,
    items_for_margin,
    items_to_settle,
    mcnemar_mid_p,
    paired_interval,
    proportion_interval,
)


class Verdict(StrEnum):
    """What a gate says."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


class GateResult(BaseModel, frozen=True):
    """A verdict and the numbers it rests on."""

    verdict: Verdict
    reason: str
    interval: ScoreInterval | None = None


class TaskCounts(BaseModel, frozen=True):
    """One task of a forgetting check, base against candidate on the same items."""

    name: str
    counts: PairedCounts
    baseline_right: int = Field(ge=0, description="items that the base model has right")
    chance: float = Field(ge=0, le=1, description="score of blind guessing")


class ForgettingRule(BaseModel, frozen=True):
    """What a forgetting check tolerates at one look. `alpha` is what this look may spend."""

    margin: float
    alpha: float
    veto_drop: float


class ForgettingResult(BaseModel, frozen=True):
    """The verdict over all tasks, what vetoed it, and what could not be judged."""

    verdict: Verdict
    reason: str
    interval: ScoreInterval | None = None
    vetoes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict for several: an error or a failure decides, then what is uncertain; nothing at all is no pass."""
    for verdict in (Verdict.ERROR, Verdict.FAILED, Verdict.INCONCLUSIVE):
        if verdict in verdicts:
            return verdict
    return Verdict.PASSED if verdicts else Verdict.INCONCLUSIVE


def judge_improvement(counts: PairedCounts, *, min_gain: float, alpha: float) -> GateResult:
    """Superiority: is the paired gain surely above, or surely not above, what the gate wants?"""
    return _judge(counts, limit=min_gain, alpha=alpha, wanted=f"must exceed {min_gain:+.3f}", what="gain")


def judge_regression(counts: PairedCounts, *, max_drop: float, alpha: float) -> GateResult:
    """Non-inferiority: is the paired difference surely above, or surely below, what the gate allows?"""
    return _judge(counts, limit=-max_drop, alpha=alpha, wanted=f"must exceed {-max_drop:+.3f}", what="difference")


def judge_forgetting(tasks: Sequence[TaskCounts], rule: ForgettingRule) -> ForgettingResult:
    """Non-inferiority of the average over tasks, with a veto for a task that is surely and clearly harmed.

    Tasks hold equally many items, so the average over tasks is the average over items; pooling overstates the
    variance a little (it counts the spread between tasks), which errs on the side of "cannot tell".
    """
    sizes = {task.counts.n for task in tasks}
    if len(sizes) > 1:
        raise ValueError(f"tasks must hold equally many items, got {sorted(sizes)}")
    judged = [task for task in tasks if not _near_chance(task)]
    warnings = tuple(_chance_warning(task) for task in tasks if _near_chance(task))
    if not judged:
        reason = "the base model is at chance on every task, so none can show forgetting: use easier items"
        return ForgettingResult(verdict=Verdict.INCONCLUSIVE, reason=reason, warnings=warnings)
    pooled = sum((task.counts for task in judged[1:]), judged[0].counts)
    average = _judge(
        pooled, limit=-rule.margin, alpha=rule.alpha, wanted=f"must exceed {-rule.margin:+.3f}",
        what=f"average difference over {len(judged)} tasks",
    )  # fmt: skip
    vetoes = _vetoes(judged, rule)
    if vetoes:
        reason = f"{'; '.join(vetoes)}; {average.reason}"
        return ForgettingResult(
            verdict=Verdict.FAILED, reason=reason, interval=average.interval, vetoes=vetoes, warnings=warnings
        )
    return ForgettingResult(
        verdict=average.verdict, reason=average.reason, interval=average.interval, warnings=warnings
    )


def finer_margin(pooled: PairedCounts, *, margin: float, alpha: float) -> str:
    """What a stricter margin would take, for the report."""
    discordance = max(pooled.discordance, 0.01)
    needed = items_for_margin(margin, discordance, alpha=alpha)
    return (
        f"a margin of {100 * margin:g} points would need about {needed} items "
        f"(90 % power for a harmless version at {100 * discordance:.1f} % discordance, alpha {alpha:g} a look)"
    )


def _judge(counts: PairedCounts, *, limit: float, alpha: float, wanted: str, what: str) -> GateResult:
    interval = paired_interval(counts, alpha=alpha)
    reason = (
        f"{what} {interval.estimate:+.3f} in [{interval.lower:+.3f}, {interval.upper:+.3f}], {wanted}; "
        f"n={counts.n}, better {counts.better}, worse {counts.worse}, one-sided alpha {alpha:g}"
    )
    if interval.lower > limit:
        return GateResult(verdict=Verdict.PASSED, reason=reason, interval=interval)
    if interval.upper <= limit:
        return GateResult(verdict=Verdict.FAILED, reason=reason, interval=interval)
    needed = items_to_settle(counts, limit=limit, alpha=alpha)
    settle = "no number of items would settle it" if needed is None else f"about {needed} items would settle it"
    return GateResult(verdict=Verdict.INCONCLUSIVE, reason=f"{reason}; cannot tell: {settle}", interval=interval)


def _vetoes(tasks: Sequence[TaskCounts], rule: ForgettingRule) -> tuple[str, ...]:
    p_values = [mcnemar_mid_p(task.counts.worse, task.counts.better) for task in tasks]
    harmed = holm(p_values, alpha=rule.alpha)
    return tuple(
        f"veto by {task.name}: difference {task.counts.difference:+.3f} beyond {-rule.veto_drop:+.3f}, "
        f"worse {task.counts.worse}, better {task.counts.better}, n={task.counts.n}, mid-p {p:.2g} (Holm at {rule.alpha:g})"
        for task, p, is_harmed in zip(tasks, p_values, harmed, strict=True)
        if is_harmed and -task.counts.difference > rule.veto_drop
    )


def _near_chance(task: TaskCounts) -> bool:
    """Within two standard errors of guessing: losing everything would not show."""
    if task.counts.n == 0:
        return True
    share = task.baseline_right / task.counts.n
    return share - task.chance <= 2 * math.sqrt(task.chance * (1 - task.chance) / task.counts.n)


def _chance_warning(task: TaskCounts) -> str:
    share = proportion_interval(task.baseline_right, task.counts.n, alpha=0.05)
    return (
        f"{task.name} left out: the base model scores {share.estimate:.3f} (n={task.counts.n}), "
        f"within two standard errors of chance ({task.chance:.3f})"
    )
