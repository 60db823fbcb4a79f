"""The parity check: is what the gateway serves what was verified? First-token log-probabilities against the reference.

How agreement is measured is in `gateway.registry.reference`: the probe of a loaded version measures it the same way.
"""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import ValidationError

from gateway.registry.reference import Logprobs, Reference, compare

from .config import ParityCheck
from .errors import EvaluationError
from .gates import GateResult, Verdict
from .report import CheckReport
from .scene import Scene, since
from .serving import Target

# A base model that is farther from its reference than this many times what is allowed is another one.
_MOST_BASE_GAPS = 2.0


def load_reference(path: Path, *, digest: str) -> Reference:
    """Read the reference of these weights; raises `EvaluationError` when it is absent or another's."""
    try:
        found = Reference.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise EvaluationError(f"{path} does not exist: the version was never verified", code="no_reference") from None
    except ValidationError as error:
        raise EvaluationError(
            f"{path} is damaged: {error.errors()[0]['msg']}; verify the version again", code="no_reference"
        ) from error
    if found.digest != digest:
        raise EvaluationError(f"{path} is about {found.digest[:12]}, not {digest[:12]}", code="no_reference")
    return found


def run_parity(scene: Scene, check: ParityCheck) -> CheckReport:
    """The served version and the served base against the reference that `verify` left.

    What the engine's batches leave unclear, or seems wrong, is asked again one by one: answers alone carry the least noise.
    """
    started = time.monotonic()
    reference = load_reference(scene.reference, digest=scene.candidate.digest)
    result = _look(scene, reference, check, concurrency=None)
    if result.verdict is not Verdict.PASSED:
        result = _look(scene, reference, check, concurrency=1)
    return CheckReport(
        kind=check.kind, name=check.name, verdict=result.verdict, reason=result.reason, seconds=since(started)
    )


def _look(scene: Scene, reference: Reference, check: ParityCheck, *, concurrency: int | None) -> GateResult:
    candidate, base = (_served(scene, reference, target, concurrency) for target in (scene.candidate, scene.base))
    return judge_parity(reference, candidate, base, max_median_gap=check.max_median_gap)


def judge_parity(reference: Reference, candidate: Logprobs, base: Logprobs, *, max_median_gap: float) -> GateResult:
    """Compare what candidate and base answered, prompt by prompt, with the reference."""
    found = compare(reference.prompts, candidate, base)
    allowed, allowed_base = found.allowed_gap(max_median_gap), _MOST_BASE_GAPS * max_median_gap
    reason = f"{found}; gap at most {allowed:.3g}, of base {allowed_base:.3g}"
    if found.base_gap > allowed_base:
        return GateResult(verdict=Verdict.ERROR, reason=f"the engine disagrees even about the base model: {reason}")
    if found.strength == "wrong" and found.seen < found.effect / 2:
        return GateResult(verdict=Verdict.FAILED, reason=f"the adapter is not applied: {reason}")
    if found.strength == "wrong" or found.gap > allowed:
        return GateResult(verdict=Verdict.FAILED, reason=f"other weights are served than were verified: {reason}")
    if found.strength == "unclear":
        return GateResult(
            verdict=Verdict.INCONCLUSIVE, reason=f"the adapter does less than the engine's noise: {reason}"
        )
    return GateResult(verdict=Verdict.PASSED, reason=reason)


def _served(scene: Scene, reference: Reference, target: Target, concurrency: int | None) -> Logprobs:
    questions = [(prompt.token_ids, prompt.candidates) for prompt in reference.prompts]
    answers = scene.serving.next_tokens(target, questions, concurrency=concurrency)
    scene.same_engine(answer.engine for answer in answers)
    return [
        [answer.logprobs[token] for token in prompt.candidates]
        for answer, prompt in zip(answers, reference.prompts, strict=True)
    ]
