from datetime import UTC, datetime

import pytest

from evals.gates import Verdict
from evals.report import CheckReport, Comparison, Example, Report, as_data, render, score
from evals.scores import Fingerprint
from evals.statistics import PairedCounts, paired_interval

CONDITIONS = Fingerprint(
    backend="gateway", base_digest="c" * 64, engine="vllm-0.32.0", dtype="bfloat16", harness="lm-eval 0.4.13"
)


def a_report(*checks: CheckReport, verdict: Verdict = Verdict.FAILED, not_run: tuple[str, ...] = ()) -> Report:
    return Report(
        target="support@2", digest="a" * 64, suite="support-emails", suite_digest="b" * 64, base_model="smollm2-135m",
        stable="support@1", look=1, verdict=verdict, reason="emails: difference -0.950", fingerprint=CONDITIONS,
        checks=checks, not_run=not_run, started_at=datetime(2026, 3, 1, 12, 0, tzinfo=UTC), seconds=61.2,
    )  # fmt: skip


def a_check() -> CheckReport:
    interval = paired_interval(PairedCounts(n=200, worse=190, better=0), alpha=0.05)
    return CheckReport(
        kind="target", name="emails", verdict=Verdict.FAILED, reason="no regression (support@1): difference -0.950",
        scores=(score("candidate", "emails", "exact_match_json", [False] * 200), score("stable", "emails", "exact_match_json", [True] * 190 + [False] * 10)),
        comparisons=(Comparison(name="no regression", baseline="support@1", verdict=Verdict.FAILED, reason="", interval=interval, better=0, worse=190),),
        warnings=("3 of 203 items stand in the training data and were dropped",),
        worse=(Example(item="x", prompt="Where | is\nmy `parcel`?", expected='{"a": 1}', base='{"a": 1}', candidate=""),),
    )  # fmt: skip


def test_the_verdict_comes_first() -> None:
    assert render(a_report(a_check())).splitlines()[0] == "# support@2 on support-emails: failed"


def test_a_reader_finds_scores_intervals_conditions_and_warnings() -> None:
    text = render(a_report(a_check(), not_run=("general",)))

    assert "| no regression | support@1 | failed | -0.950 in [-0.970, -0.918] | 0 | 190 |" in text
    assert "| emails | candidate | exact_match_json | 0.000 | 0.000 to 0.019 | 200 |" in text
    assert "| emails | stable | exact_match_json | 0.950 | 0.910 to 0.973 | 200 |" in text
    assert "vllm-0.32.0" in text
    assert "> 3 of 203 items" in text
    assert "Not run after that: general." in text


def test_examples_do_not_break_the_table() -> None:
    text = render(a_report(a_check()))

    assert '| `Where \\| is my \'parcel\'?` | `{"a": 1}` | `{"a": 1}` | (nothing) |' in text


def test_the_data_reads_back_as_the_same_report() -> None:
    report = a_report(a_check())

    assert Report.model_validate(as_data(report)) == report


@pytest.mark.parametrize(("right", "value"), [([True, False], 0.5), ([], 0.0)])
def test_a_score_is_a_share_with_bounds(right: list[bool], value: float) -> None:
    found = score("base", "emails", "exact_match", right)

    assert found.value == value
    assert 0 <= found.lower <= value <= found.upper <= 1
