"""Verdicts are final, and a version counts as served only when it is."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from gateway.jobs.models import EvaluationSpec
from gateway.jobs.residence import Place, judge_residence
from gateway.jobs.verdicts import NewVerdict, Verdict, supersedes
from gateway.registry.models import ResidencyState, VersionState
from tests.factories import a_version

DIGEST = "a" * 64
SPEC = EvaluationSpec(target="support@1", digest=DIGEST, suite="emails", suite_digest=DIGEST, stable="tiny", look=2)
DATA: dict[str, Any] = {"verdict": "passed", "reason": "why", "fingerprint": "f", "report": {}}


def test_only_the_larger_look_changes_an_inconclusive_verdict() -> None:
    allowed = {
        (old, old_looks, new, looks)
        for old, old_looks, new, looks in product(Verdict, (1, 2), Verdict, (1, 2))
        if old is not Verdict.ERROR and supersedes(new, looks, old=old, old_looks=old_looks)
    }

    assert allowed == {
        (Verdict.INCONCLUSIVE, 1, new, 2) for new in (Verdict.PASSED, Verdict.FAILED, Verdict.INCONCLUSIVE)
    }


def test_an_error_judged_nothing_and_gives_way() -> None:
    assert all(supersedes(new, 1, old=Verdict.ERROR, old_looks=1) for new in Verdict)


def test_reads_a_result() -> None:
    verdict = NewVerdict.from_result(SPEC, DATA, baseline="b" * 64)

    assert (verdict.verdict, verdict.looks, verdict.baseline) == (Verdict.PASSED, 2, "b" * 64)


@pytest.mark.parametrize(
    "change", [{"verdict": "splendid"}, {"fingerprint": ""}, {"fingerprint": "f" * 65}, {"report": 3}, {"reason": None}]
)
def test_refuses_a_result_without_a_verdict(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        NewVerdict.from_result(SPEC, DATA | change, baseline="b" * 64)


READY, LOADING = Place(state=ResidencyState.READY), Place(state=ResidencyState.LOADING)


@pytest.mark.parametrize(
    ("state", "places", "expected"),
    [
        (VersionState.VERIFIED, {"one": READY}, "ready"),
        (VersionState.VERIFIED, {"one": READY, "two": READY}, "ready"),
        (VersionState.VERIFIED, {"one": READY, "two": LOADING}, "waiting"),
        (VersionState.VERIFIED, {"one": READY, "two": Place()}, "waiting"),
        (VersionState.VERIFIED, {}, "waiting"),
        (VersionState.VERIFIED, {"one": Place(state=ResidencyState.QUARANTINED)}, "impossible"),
        (VersionState.VERIFIED, {"one": READY, "two": Place(state=ResidencyState.REFUSED)}, "impossible"),
        (VersionState.RECEIVED, {"one": READY}, "waiting"),
        (VersionState.REJECTED, {"one": READY}, "impossible"),
        (VersionState.QUARANTINED, {"one": READY}, "impossible"),
    ],
)
def test_a_version_is_served_when_every_ready_engine_has_it(
    state: VersionState, places: dict[str, Place], expected: str
) -> None:
    assert judge_residence(a_version(state=state), places, engine_enabled=True).state == expected


def test_without_an_engine_verified_is_enough() -> None:
    assert judge_residence(a_version(), {}, engine_enabled=False).state == "ready"


def test_a_version_that_waits_for_its_files_is_waited_for_by_nobody() -> None:
    waiting = a_version(state=VersionState.RECEIVED, state_code="digest_mismatch", state_reason="files are damaged")

    found = judge_residence(waiting, {}, engine_enabled=True)

    assert (found.state, found.code, found.reason) == ("impossible", "digest_mismatch", "files are damaged")


def test_a_verification_that_was_given_up_is_told() -> None:
    found = judge_residence(a_version(state=VersionState.RECEIVED), {}, engine_enabled=True, given_up="no memory")

    assert (found.state, found.code) == ("impossible", "verify_crashed")
    assert "no memory" in (found.reason or "")


def test_the_cause_is_carried_on() -> None:
    version = a_version(state=VersionState.REJECTED, state_code="log_loss", state_reason="24.6 nats")

    found = judge_residence(version, {}, engine_enabled=True)

    assert (found.code, found.reason) == ("log_loss", "24.6 nats")
