"""After a load and before any traffic: does this engine compute with these weights what verification computed?"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import BaseModel, ValidationError

from ..errors import Refused, Unavailable
from ..registry.reference import Agreement, Logprobs, Reference, ReferencePrompt, compare
from .admin import EngineAdmin

log = structlog.get_logger(__name__)

# The same base request in the same company gives the same log-probabilities to the last bit, and an adapter whose weights
# match no module moves them by exactly nothing. Real adapters move some candidate by tenths of a nat at least.
MIN_EFFECT_NATS = 1e-3
# A served change below this share of the verified one is none at all; between it and the whole it is another one.
NO_EFFECT_SLOPE = 0.25
# Two answers that differ by noise alone do so by this many times what base differs from its reference by, at most.
_NOISE_OF_BOTH = 2.0
# bf16 serving against the fp32 reference measured 0.09 nats at the median on a right adapter; a wrong one is off by its
# whole effect. An engine whose base model lies farther from its own reference than a third of this is allowed more.
LEAST_ALLOWED_GAP_NATS = 0.25
# Requests at a time in each look. The first takes traffic's time once and is done; whatever it cannot tell, or holds
# against a version, is asked again one by one: answers alone carry the least of the noise of batches.
_WIDTHS = (16, 1)


class Fault(BaseModel, frozen=True):
    """Why a version may not serve."""

    code: str
    reason: str


def read_reference(path: Path) -> Reference:
    """The stored reference. Raises `Refused(code="no_reference")` when there is none, `Unavailable` when that cannot be told."""
    try:
        return Reference.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise Refused(f"{path.name}: no reference log-probabilities ({error.strerror})", code="no_reference") from error
    except OSError as error:
        raise Unavailable(
            f"{path.name} cannot be read now ({error.strerror}); trying again", code="storage_failed"
        ) from error
    except ValidationError as error:
        raise Refused(f"{path.name} is not a reference: {error.errors()[0]['msg']}", code="no_reference") from error


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one look at a version says: a fault, that all is well, or (neither) that the engine is too noisy to tell."""

    fault: Fault | None = None
    is_well: bool = False
    agreement: Agreement | None = None


def judge_probe(reference: Sequence[ReferencePrompt], adapter: Logprobs, base: Logprobs) -> Judgement:
    """Compare the engine's log-probabilities with the adapter, without it, and those of verification."""
    values = [value for answers in (adapter, base) for answer in answers for value in answer]
    if not all(map(math.isfinite, values)):
        reason = "the engine gives log-probabilities that are not finite"
        return Judgement(Fault(code="non_finite", reason=reason))
    found = compare(reference, adapter, base)
    allowed = found.allowed_gap(LEAST_ALLOWED_GAP_NATS)
    is_noise = found.seen <= _NOISE_OF_BOTH * found.base_gap
    is_none = found.strength == "wrong" and abs(found.slope) < NO_EFFECT_SLOPE and is_noise
    fault = None
    if is_none or _largest_change(adapter, base) < MIN_EFFECT_NATS:
        fault = Fault(code="no_effect", reason=f"the engine answers as the base model does: {found}")
    elif found.strength == "wrong" or found.gap > allowed:
        reason = f"these are not the weights that were verified: {found}; allowed gap {allowed:.3f}"
        fault = Fault(code="parity", reason=reason)
    return Judgement(fault, is_well=fault is None and found.strength == "whole", agreement=found)


def _largest_change(adapter: Logprobs, base: Logprobs) -> float:
    return max(
        abs(with_it - without)
        for one, other in zip(adapter, base, strict=True)
        for with_it, without in zip(one, other, strict=True)
    )


class Prober:
    """Probes versions on one process start of one engine."""

    def __init__(self, admin: EngineAdmin) -> None:
        self._admin = admin

    async def probe(self, engine_name: str, reference: Reference) -> Fault | None:
        """None when the version may serve. Raises `NotFinite`, `EngineUnreachable`, `EngineRefused`.

        A fault must show in every look. What no look can tell, an effect that drowns in the engine's own noise, is let in.
        """
        fault: Fault | None = None
        for width in _WIDTHS:
            found = judge_probe(reference.prompts, *await self._look(engine_name, reference, width))
            fault = found.fault
            if found.is_well or (fault is not None and fault.code == "non_finite"):
                return fault
            log.info("probe looks closer", adapter=engine_name, width=width, found=str(found.agreement))
        if fault is None:
            log.warning("probe cannot tell the adapter from the engine's noise", adapter=engine_name)
        return fault

    async def _look(self, engine_name: str, reference: Reference, width: int) -> tuple[Logprobs, Logprobs]:
        """The adapter's answers and base's, so many requests at a time."""
        room = asyncio.Semaphore(width)

        async def ask(model: str, prompt: ReferencePrompt) -> list[float]:
            async with room:
                return await self._admin.first_token(model, prompt.token_ids, prompt.candidates)

        models = (engine_name, self._admin.base_model)
        tasks = [asyncio.create_task(ask(model, prompt)) for model in models for prompt in reference.prompts]
        try:
            # The first failure decides; a group of failures would say the same thing sixteen times.
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        count = len(reference.prompts)
        return answers[:count], answers[count:]
