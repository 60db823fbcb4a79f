"""An evaluation's report, as the evaluator writes it, reads well on a terminal and feeds the demo's figures."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from deploy.demo.run import figures
from evals.gates import Verdict
from evals.report import CheckReport, Comparison, Report, as_data, score
from evals.scores import Fingerprint
from evals.statistics import ScoreInterval
from gateway.cli_evaluations import render_evaluation
from gateway.cli_gc import render_gc
from gateway.client_models import GcReport, Job


def a_job(**fields: Any) -> Job:
    values = {
        "id": "eval-1", "kind": "evaluation", "state": "succeeded", "created_at": datetime(2026, 1, 1, tzinfo=UTC),
        "spec": {"target": "support@1", "suite": "support-emails"},
    }  # fmt: skip
    return Job.model_validate(values | fields)


def a_report() -> dict[str, Any]:
    interval = ScoreInterval(estimate=0.9, lower=0.85, upper=0.94, alpha=0.05, n=10)
    check = CheckReport(
        kind="target", name="emails", verdict=Verdict.PASSED, reason="gain +0.900 [all]", warnings=("3 items dropped",),
        scores=(
            score("candidate", "emails", "exact_match_json", [True] * 9 + [False]),
            score("candidate", "emails", "valid_format", [True] * 10),
            score("base", "emails", "exact_match_json", [False] * 10),
            score("base", "emails", "valid_format", [True] + [False] * 9),
            score("few_shot", "emails", "exact_match_json", [True] + [False] * 9),
            score("candidate", "unseen_phrasings", "exact_match_json", [True, False]),
        ),
        comparisons=(Comparison(name="improvement", baseline="base", verdict=Verdict.PASSED, reason="", interval=interval, better=9),),
    )  # fmt: skip
    report = Report(
        target="support@1", digest="a" * 64, suite="support-emails", suite_digest="b" * 64, base_model="base", stable="base",
        look=1, verdict=Verdict.PASSED, reason="all passed", checks=(check,), not_run=("general",), seconds=1.0,
        started_at=datetime(2026, 1, 1, tzinfo=UTC),
        fingerprint=Fingerprint(backend="gateway", base_digest="c" * 64, engine="vllm", dtype="bfloat16", harness="lm-eval"),
    )  # fmt: skip
    return as_data(report)


def shown(job: Job) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_evaluation(job))
    return console.export_text()


def test_shows_verdict_gates_scores_and_what_was_left_out() -> None:
    text = shown(a_job(result={"verdict": "passed", "reason": "all passed", "report": a_report()}))

    assert "support@1 on support-emails: passed" in text
    assert "gain +0.900 [all]" in text
    assert "+0.900 in [+0.850, +0.940]" in text
    assert "3 items dropped" in text
    assert "Not run after that: general" in text


def test_a_failed_job_shows_its_error() -> None:
    text = shown(a_job(state="failed", error_code="serving_failed", error_message="no engine [yet]"))

    assert "serving_failed: no engine [yet]" in text


def test_the_demo_reads_its_figures_from_the_report() -> None:
    found = figures(a_job(result={"verdict": "passed", "report": a_report()}))

    assert found == {
        "exact_match_base": 0.0,
        "exact_match_few_shot": 0.1,
        "exact_match_tuned": 0.9,
        "exact_match_tuned_unseen_phrasings": 0.5,
        "valid_format_base": 0.1,
        "valid_format_tuned": 1.0,
    }


def test_figures_of_a_report_that_is_not_there_are_none() -> None:
    assert set(figures(a_job(result=None)).values()) == {None}


def test_what_is_over_reads_well() -> None:
    report = GcReport.model_validate(
        {
            "dry_run": True, "is_complete": False, "notes": ["a note"],
            "kinds": [{"kind": "exposures", "unit": "rows", "count": 100_000, "is_more": True, "size_bytes": 42_200_000,
                       "oldest": "2026-01-01T00:00:00Z"}],
        }
    )  # fmt: skip
    console = Console(file=io.StringIO(), width=120)

    console.print(render_gc(report))
    console.print(render_gc(GcReport(dry_run=False)))

    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "100,000+ rows" in text
    assert "about 40.2 MiB" in text
    assert "a note" in text
    assert "Nothing is past its retention." in text
