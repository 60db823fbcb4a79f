"""How good is a forgetting check at its job? Simulates its whole decision, the larger look included.

python -m evals.power evals/suites/general-cloze --json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from .config import ForgettingCheck, LoglikelihoodCheck, Suite, load_suite
from .errors import EvaluationError
from .gates import ForgettingRule, TaskCounts, Verdict, judge_forgetting
from .statistics import PairedCounts

DISCORDANCES = (0.05, 0.10, 0.15)
BASELINE_SHARE = 0.85  # only decides whether a task counts as near chance: in power calculations none does


class Power(BaseModel, frozen=True):
    """Chances of passing one check, at one discordance."""

    check: str
    discordance: float = Field(description="share of items on which a harmless candidate and its base differ")
    margin: float
    items: tuple[int, int] = Field(description="over all tasks, at the first look and at the larger one")
    pass_harmless: float
    pass_harmless_first_look: float
    pass_loss_of_twice_margin: float
    simulations: int


def simulate(
    check: ForgettingCheck | LoglikelihoodCheck, *, discordance: float, simulations: int = 2000, seed: int = 0
) -> Power:
    """Pass rates of a harmless version and of one that lost twice the margin on every task."""
    harmless_first, harmless = _pass_rates(check, discordance, loss=0.0, simulations=simulations, seed=seed)
    _, harmful = _pass_rates(check, discordance, loss=2 * check.margin, simulations=simulations, seed=seed + 1)
    return Power(
        check=check.name, discordance=discordance, margin=check.margin,
        items=(len(check.tasks) * check.items[0], len(check.tasks) * check.items[1]),
        pass_harmless=harmless, pass_harmless_first_look=harmless_first,
        pass_loss_of_twice_margin=harmful, simulations=simulations,
    )  # fmt: skip


def suite_power(suite: Suite, *, simulations: int = 2000) -> tuple[Power, ...]:
    """Every forgetting check of a suite at 5, 10 and 15 % discordance."""
    checks = [check for check in suite.checks if isinstance(check, ForgettingCheck | LoglikelihoodCheck)]
    return tuple(
        simulate(check, discordance=discordance, simulations=simulations)
        for check in checks
        for discordance in DISCORDANCES
    )


def decide_look(check: ForgettingCheck | LoglikelihoodCheck, worse: NDArray[np.int64], better: NDArray[np.int64],
                n: int) -> Verdict:  # fmt: skip
    """The verdict of one look on these counts per task: the very function that judges real scores."""
    tasks = [
        TaskCounts(
            name=name, counts=PairedCounts(n=n, worse=int(w), better=int(b)),
            baseline_right=round(BASELINE_SHARE * n), chance=0.5,
        )
        for name, w, b in zip(check.task_names, worse, better, strict=True)
    ]  # fmt: skip
    return judge_forgetting(tasks, look_rule(check)).verdict


def look_rule(check: ForgettingCheck | LoglikelihoodCheck) -> ForgettingRule:
    """What each of the two looks tolerates: both together err with at most the check's alpha (Bonferroni)."""
    return ForgettingRule(margin=check.margin, alpha=check.alpha / 2, veto_drop=check.veto_drop)


def _pass_rates(
    check: ForgettingCheck | LoglikelihoodCheck, discordance: float, *, loss: float, simulations: int, seed: int
) -> tuple[float, float]:
    random = np.random.default_rng(seed)
    spread = max(discordance, loss)  # a version that lost more than the discordance differs on what it lost
    rates = ((spread + loss) / 2, (spread - loss) / 2, 1 - spread)
    first, second = check.items
    passed_first = passed = 0
    for _ in range(simulations):
        seen = random.multinomial(first, rates, size=len(check.tasks))
        verdict = decide_look(check, seen[:, 0], seen[:, 1], first)
        passed_first += verdict is Verdict.PASSED
        if verdict is Verdict.INCONCLUSIVE:
            more = seen + random.multinomial(second - first, rates, size=len(check.tasks))
            verdict = decide_look(check, more[:, 0], more[:, 1], second)
        passed += verdict is Verdict.PASSED
    return passed_first / simulations, passed / simulations


def main() -> None:
    """Print the power of a suite's forgetting checks."""
    parser = argparse.ArgumentParser(description="Power of a suite's forgetting checks, by simulation.")
    parser.add_argument("suite", type=Path, help="folder with suite.yaml")
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    arguments = parser.parse_args()
    try:
        found = suite_power(load_suite(arguments.suite), simulations=arguments.simulations)
    except EvaluationError as error:
        sys.exit(error.message)
    if arguments.json:
        sys.stdout.write(json.dumps([power.model_dump(mode="json") for power in found]) + "\n")
        return
    sys.stdout.write(
        f"{'check':<24}{'margin':>8}{'items':>14}{'differ':>8}{'P(pass|harmless)':>18}{'P(pass|2x loss)':>17}\n"
    )
    for power in found:
        items = f"{power.items[0]} to {power.items[1]}"
        sys.stdout.write(
            f"{power.check:<24}{power.margin:>8.3f}{items:>14}{power.discordance:>8.2f}"
            f"{power.pass_harmless:>18.3f}{power.pass_loss_of_twice_margin:>17.4f}\n"
        )


if __name__ == "__main__":
    main()
