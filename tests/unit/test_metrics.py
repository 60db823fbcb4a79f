"""Collectors: counted under the right labels, and never without bound."""

from __future__ import annotations

import pytest

from gateway import metrics as module
from gateway.metrics import Finished, Metrics

SEEN = Finished(status=200, latency_s=0.2, first_token_s=0.1, prompt_tokens=5, completion_tokens=7)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_a_completion_is_counted_by_route_variant_and_version() -> None:
    metrics = Metrics()
    labels = {"route": "support", "variant": "support@1", "version": "support@1", "traffic": "assigned"}

    metrics.traffic("support", "support@1", "assigned").finish(SEEN)

    assert value(metrics, "turnout_requests_total", **labels, status="200") == 1
    assert value(metrics, "turnout_tokens_total", **labels, kind="prompt") == 5
    assert value(metrics, "turnout_tokens_total", **labels, kind="completion") == 7
    assert value(metrics, "turnout_request_seconds_count", **labels) == 1
    assert value(metrics, "turnout_first_token_seconds_count", **labels) == 1


def test_an_answer_without_tokens_counts_none() -> None:
    metrics = Metrics()

    metrics.traffic("r", "v", "pinned").finish(Finished(502, 0.1, None, 0, 0))

    labels = {"route": "r", "variant": "v", "version": "v", "traffic": "pinned"}
    assert value(metrics, "turnout_requests_total", **labels, status="502") == 1
    assert value(metrics, "turnout_first_token_seconds_count", **labels) == 0


def test_series_are_bounded_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SERIES", 3)
    metrics = Metrics()

    for number in range(20):
        metrics.traffic("r", f"r@{number}", "assigned").finish(SEEN)

    text = metrics.render().decode()
    assert text.count("turnout_requests_total{") == 4
    assert (
        value(
            metrics,
            "turnout_requests_total",
            route="other",
            variant="other",
            version="other",
            traffic="assigned",
            status="200",
        )
        == 17
    )


def test_counts_are_replaced_as_a_whole() -> None:
    metrics = Metrics()
    metrics.set_counts(metrics.jobs, {("verify", "running"): 2})

    metrics.set_counts(metrics.jobs, {("verify", "succeeded"): 5})

    assert value(metrics, "turnout_jobs", kind="verify", state="running") is None
    assert value(metrics, "turnout_jobs", kind="verify", state="succeeded") == 5


def test_counts_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SERIES", 2)
    metrics = Metrics()

    metrics.set_counts(metrics.verdicts, {(f"suite-{number}", "passed"): 1 for number in range(10)})

    assert metrics.render().decode().count("turnout_gate_verdicts{") == 3
    assert value(metrics, "turnout_gate_verdicts", suite="other", verdict="other") == 8
