"""What an evaluation found: `report.json` for programs, `report.md` for people. The verdict comes first."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from .gates import Verdict
from .scores import Fingerprint
from .statistics import ScoreInterval, proportion_interval

Subject = Literal["candidate", "base", "few_shot", "stable"]
MOST_EXAMPLES = 5


class Score(BaseModel, frozen=True):
    """How one subject did on one set of items, with 95 % bounds (two-sided)."""

    subject: Subject
    set: str = Field(description="the check's name, a task's, or a report-only set's")
    metric: str
    n: int
    value: float
    lower: float
    upper: float


class Comparison(BaseModel, frozen=True):
    """Candidate against one baseline on the same items."""

    name: str
    baseline: str = Field(description="what it was held against, by name")
    verdict: Verdict | None = Field(description="None where it is only reported")
    reason: str
    interval: ScoreInterval | None = None
    better: int = 0
    worse: int = 0


class Example(BaseModel, frozen=True):
    """One item on which candidate and base disagree."""

    item: str
    prompt: str
    expected: str
    base: str
    candidate: str


class CheckReport(BaseModel, frozen=True):
    """One check of the suite."""

    kind: str
    name: str
    verdict: Verdict
    reason: str
    seconds: float = 0.0
    scores: tuple[Score, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    warnings: tuple[str, ...] = ()
    worse: tuple[Example, ...] = Field(default=(), description="items that base has right and the candidate wrong")
    better: tuple[Example, ...] = Field(default=(), description="items that the candidate has right and base wrong")


class Report(BaseModel, frozen=True):
    """The whole evaluation."""

    schema_version: Literal[1] = 1
    target: str
    digest: str
    suite: str
    suite_digest: str
    base_model: str
    stable: str
    look: int
    verdict: Verdict
    reason: str
    fingerprint: Fingerprint
    # No part of the fingerprint: a measured number would make the results of two starts of one engine incomparable.
    batch_noise: float | None = Field(
        default=None, description="nats by which batches alone moved the engine's answers, measured at its start"
    )
    checks: tuple[CheckReport, ...]
    not_run: tuple[str, ...] = Field(default=(), description="checks left out after the first failure or error")
    started_at: datetime
    seconds: float


def score(subject: Subject, name: str, metric: str, right: list[bool]) -> Score:
    """A share of items with Wilson's interval."""
    interval = proportion_interval(sum(right), len(right), alpha=0.025)
    return Score(
        subject=subject, set=name, metric=metric, n=len(right),
        value=interval.estimate, lower=interval.lower, upper=interval.upper,
    )  # fmt: skip


def as_data(report: Report) -> dict[str, Any]:
    """Plain data for `result.json`."""
    data: dict[str, Any] = report.model_dump(mode="json")
    return data


def render(report: Report) -> str:
    """The report as Markdown."""
    lines = [
        f"# {report.target} on {report.suite}: {report.verdict}",
        "",
        report.reason,
        "",
        *_table(
            ["", ""],
            [
                ["digest", f"`{report.digest[:12]}`"],
                ["suite digest", f"`{report.suite_digest[:12]}`"],
                ["base model, stable", f"{report.base_model}, {report.stable}"],
                ["look", f"{report.look}"],
                ["conditions", ", ".join(f"{k} {_short(v)}" for k, v in report.fingerprint.model_dump().items())],
                ["batch noise", "not measured" if report.batch_noise is None else f"{report.batch_noise:.3f} nats"],
                ["took", f"{report.seconds:.0f} s from {report.started_at:%Y-%m-%d %H:%M:%S} UTC"],
            ],
        ),
    ]
    for check in report.checks:
        lines += _check(check)
    if report.not_run:
        lines += ["", f"Not run after that: {', '.join(report.not_run)}."]
    return "\n".join(lines) + "\n"


def _check(check: CheckReport) -> list[str]:
    lines = ["", f"## {check.name} ({check.kind}): {check.verdict}", "", f"{check.reason} ({check.seconds:.0f} s)"]
    if check.comparisons:
        rows = [
            [c.name, c.baseline, str(c.verdict or "reported"), _interval(c.interval), str(c.better), str(c.worse)]
            for c in check.comparisons
        ]
        lines += ["", *_table(["comparison", "against", "verdict", "difference", "better", "worse"], rows)]
    if check.scores:
        rows = [
            [s.set, s.subject, s.metric, f"{s.value:.3f}", f"{s.lower:.3f} to {s.upper:.3f}", str(s.n)]
            for s in check.scores
        ]
        lines += ["", *_table(["items", "who", "metric", "score", "95 %", "n"], rows)]
    lines += [f"\n> {warning}" for warning in check.warnings]
    for title, examples in (("Base right, tuned wrong", check.worse), ("Tuned right, base wrong", check.better)):
        if examples:
            lines += ["", f"### {title}"]
            rows = [[_cell(e.prompt), _cell(e.expected), _cell(e.base), _cell(e.candidate)] for e in examples]
            lines += ["", *_table(["item", "expected", "base", "tuned"], rows)]
    return lines


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _interval(interval: ScoreInterval | None) -> str:
    if interval is None:
        return ""
    return f"{interval.estimate:+.3f} in [{interval.lower:+.3f}, {interval.upper:+.3f}]"


def _cell(text: str, most: int = 160) -> str:
    flat = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return f"`{flat[-most:]}`" if flat else "(nothing)"


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
