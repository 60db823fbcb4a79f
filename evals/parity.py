"""The parity check: is what the gateway serves what was verified? First-token log-probabilities against the reference."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from .config import ParityCheck
from .errors import EvaluationError
from .gates import GateResult, Verdict
from .report import CheckReport
from .scene import Scene, since
from .serving import Target


class ReferencePrompt(BaseModel, frozen=True):
    """A prompt and what the verified weights and the base make of its next token."""

    token_ids: tuple[int, ...] = Field(min_length=1)
    candidates: tuple[int, ...] = Field(min_length=1, max_length=20)
    adapter: tuple[float, ...]
    base: tuple[float, ...]


class Reference(BaseModel, frozen=True):
    """`reference.json`, left by `verify`. Logarithms are natural, at temperature 1."""

    schema_version: Literal[1] = Field(alias="schema")
    digest: str
    prompts: tuple[ReferencePrompt, ...] = Field(min_length=1)
    fingerprint: dict[str, str]


Logprobs = Sequence[Sequence[float]]


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
    """The served version and the served base against the reference that `verify` left."""
    started = time.monotonic()
    reference = load_reference(scene.reference, digest=scene.candidate.digest)
    candidate, base = (_served(scene, reference, target) for target in (scene.candidate, scene.base))
    result = judge_parity(reference, candidate, base, max_median_gap=check.max_median_gap)
    return CheckReport(
        kind=check.kind, name=check.name, verdict=result.verdict, reason=result.reason, seconds=since(started)
    )


def judge_parity(reference: Reference, candidate: Logprobs, base: Logprobs, *, max_median_gap: float) -> GateResult:
    """Compare what candidate and base answered, prompt by prompt, with the reference."""
    wanted = [prompt.adapter for prompt in reference.prompts]
    plain = [prompt.base for prompt in reference.prompts]
    gap, base_gap = _gap(candidate, wanted), _gap(base, plain)
    effect, seen = _gap(wanted, plain), _gap(candidate, base)
    reason = (
        f"median gap to the verified weights {gap:.3f} nats, of base to its reference {base_gap:.3f} "
        f"(both at most {max_median_gap:g}); tuned differs from base by {seen:.4f} served, {effect:.4f} verified "
        f"(at least half of it); {len(reference.prompts)} prompts"
    )
    if base_gap > max_median_gap:
        return GateResult(verdict=Verdict.ERROR, reason=f"the engine disagrees even about the base model: {reason}")
    if seen < effect / 2:
        return GateResult(verdict=Verdict.FAILED, reason=f"the adapter is not applied: {reason}")
    if gap > max_median_gap:
        return GateResult(verdict=Verdict.FAILED, reason=f"other weights are served than were verified: {reason}")
    return GateResult(verdict=Verdict.PASSED, reason=reason)


def _served(scene: Scene, reference: Reference, target: Target) -> Logprobs:
    questions = [(prompt.token_ids, prompt.candidates) for prompt in reference.prompts]
    answers = scene.serving.next_tokens(target, questions)
    scene.same_engine(answer.engine for answer in answers)
    return [
        [answer.logprobs[token] for token in prompt.candidates]
        for answer, prompt in zip(answers, reference.prompts, strict=True)
    ]


def _gap(left: Logprobs, right: Logprobs) -> float:
    return median(abs(a - b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True))
