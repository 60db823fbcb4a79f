"""A version's reference log-probabilities, as `verify` leaves them, and how far what is served agrees with them.

An engine's numbers depend on what else is in its batch, by tenths of a nat on some processors, so closeness alone tells
little. What an adapter *does* tells more: the served change of many log-probabilities is regressed on the verified change.
A right adapter has slope 1, one at half strength 0.5, one that is not applied 0, whatever the noise around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

Logprobs = Sequence[Sequence[float]]  # prompt x candidate, nats

# Between one adapter at half strength and the whole of it, and between the whole and twice as much.
LEAST_SLOPE = 0.75
MOST_SLOPE = 1.5
# Standard errors that a judgement keeps from those bounds.
_SURE = 3.0
# Served log-probabilities may lie this many times as far from their reference as the base model's own do, up to a bound
# that no rounding reaches: beyond it, reference and engine speak of different models.
_GAPS_OF_BASE = 3.0
_MOST_ALLOWED_GAP = 2.0


class ReferencePrompt(BaseModel, frozen=True):
    """One prompt, some possible next tokens, and what the verified weights and the base make of them."""

    token_ids: tuple[int, ...] = Field(min_length=1)
    candidates: tuple[int, ...] = Field(min_length=1, max_length=20)
    adapter: tuple[float, ...]
    base: tuple[float, ...]

    @model_validator(mode="after")
    def _one_value_each(self) -> ReferencePrompt:
        if not len(self.candidates) == len(self.adapter) == len(self.base):
            raise ValueError("one log-probability for each candidate is needed")
        return self


class Reference(BaseModel, frozen=True):
    """`reference.json`. Logarithms are natural, at temperature 1."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    digest: str
    prompts: tuple[ReferencePrompt, ...] = Field(min_length=1)
    fingerprint: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Agreement:
    """What is served against what was verified; gaps in nats."""

    slope: float  # of the served change on the verified change
    slope_error: float  # its standard error, by prompts
    gap: float  # median distance of the adapter's answers to the verified ones
    base_gap: float  # the same of the base model: rounding, and the company of its batches
    effect: float  # median change that the adapter makes, as verified
    seen: float  # the same as served
    prompts: int

    @property
    def strength(self) -> Literal["whole", "wrong", "unclear"]:
        """Whether the verified change is served in full, surely not, or cannot be told from so few noisy answers."""
        low, high = self.slope - _SURE * self.slope_error, self.slope + _SURE * self.slope_error
        if high < LEAST_SLOPE or low > MOST_SLOPE:
            return "wrong"
        return "whole" if low > LEAST_SLOPE - 0.25 and high < MOST_SLOPE + 0.5 else "unclear"

    def allowed_gap(self, least: float) -> float:
        """How far the adapter's answers may lie from the verified ones on an engine with this base gap."""
        return max(least, min(_GAPS_OF_BASE * self.base_gap, _MOST_ALLOWED_GAP))

    def __str__(self) -> str:
        return (
            f"served change is {self.slope:.2f} ± {self.slope_error:.2f} of the verified one (whole: 1), median gap to the "
            f"verified weights {self.gap:.3f} nats, of base to its reference {self.base_gap:.3f}; tuned differs from base by "
            f"{self.seen:.4f} served, {self.effect:.4f} verified; {self.prompts} prompts"
        )


def compare(reference: Sequence[ReferencePrompt], adapter: Logprobs, base: Logprobs) -> Agreement:
    """Compare what adapter and base answered, prompt by prompt, with the reference.

    Slope through the origin by least squares; its error is robust to noise that a prompt's candidates share (Liang and
    Zeger 1986, clusters are prompts, with the small-sample factor P / (P - 1)).
    """
    wanted, plain = [prompt.adapter for prompt in reference], [prompt.base for prompt in reference]
    verified = [np.subtract(one, other) for one, other in zip(wanted, plain, strict=True)]
    served = [np.subtract(one, other) for one, other in zip(adapter, base, strict=True)]
    slope, error = _slope(verified, served)
    return Agreement(
        slope=slope,
        slope_error=error,
        gap=_gap(adapter, wanted),
        base_gap=_gap(base, plain),
        effect=_gap(wanted, plain),
        seen=_gap(adapter, base),
        prompts=len(reference),
    )


def _slope(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> tuple[float, float]:
    total = sum(float(x @ x) for x in xs)
    if total == 0.0:
        return 0.0, float("inf")
    slope = sum(float(x @ y) for x, y in zip(xs, ys, strict=True)) / total
    scores = [float(x @ (y - slope * x)) for x, y in zip(xs, ys, strict=True)]
    if len(xs) == 1:
        return slope, float("inf")
    factor = len(xs) / (len(xs) - 1)
    return slope, float(np.sqrt(factor * sum(score**2 for score in scores)) / total)


def _gap(left: Logprobs, right: Logprobs) -> float:
    return float(
        median(abs(a - b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True))
    )
