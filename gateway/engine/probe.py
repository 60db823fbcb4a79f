"""After a load and before any traffic: does this engine compute with these weights what verification computed?"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pydantic import BaseModel, Field, ValidationError, model_validator

from ..errors import Refused, Unavailable
from .admin import EngineAdmin

# The same base request twice gives the same log-probabilities to the last bit, and an adapter whose weights match no
# module moves them by exactly nothing. Real adapters move some candidate by tenths of a nat at least.
MIN_EFFECT_NATS = 1e-3
# bf16 serving against the fp32 reference measured 0.09 nats at the median and 0.28 at the 95th percentile on a right
# adapter; a wrong one is off by its whole effect.
MAX_MEDIAN_DIFFERENCE_NATS = 0.25
# One batch: a probe takes traffic's time once and is done.
_PARALLEL = 16


class ReferencePrompt(BaseModel, frozen=True):
    """One prompt, some possible next tokens, and their log-probabilities by `verify`."""

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
    """What `verify` stored of a version."""

    digest: str
    prompts: tuple[ReferencePrompt, ...] = Field(min_length=1)


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


def judge_probe(adapter: Sequence[float], base: Sequence[float], reference: Sequence[float]) -> Fault | None:
    """Compare the engine's log-probabilities with the adapter, without it, and those of verification."""
    if not adapter or not all(map(math.isfinite, (*adapter, *base))):
        return Fault(code="non_finite", reason="the engine gives log-probabilities that are not finite")
    effect = max(abs(with_it - without) for with_it, without in zip(adapter, base, strict=True))
    if effect < MIN_EFFECT_NATS:
        reason = f"no effect: the engine answers as the base model does (largest difference {effect:.5f} nats)"
        return Fault(code="no_effect", reason=reason)
    difference = median(abs(here - there) for here, there in zip(adapter, reference, strict=True))
    if difference > MAX_MEDIAN_DIFFERENCE_NATS:
        reason = (
            f"the engine's log-probabilities differ from the verified ones by {difference:.3f} nats at the median, "
            f"allowed {MAX_MEDIAN_DIFFERENCE_NATS}, n={len(adapter)}"
        )
        return Fault(code="parity", reason=reason)
    return None


class Prober:
    """Probes versions on one process start of one engine; base's own answers are asked once."""

    def __init__(self, admin: EngineAdmin) -> None:
        self._admin = admin
        self._base: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = {}
        self._room = asyncio.Semaphore(_PARALLEL)

    async def probe(self, engine_name: str, reference: Reference) -> Fault | None:
        """None when the version may serve. Raises `NotFinite`, `EngineUnreachable`, `EngineRefused`."""
        asked = [asyncio.create_task(self._ask(engine_name, prompt)) for prompt in reference.prompts]
        asked_base = [asyncio.create_task(self._ask_base(prompt)) for prompt in reference.prompts]
        try:
            # The first failure decides; a group of failures would say the same thing sixteen times.
            await asyncio.gather(*asked, *asked_base)
        finally:
            for task in (*asked, *asked_base):
                task.cancel()
            await asyncio.gather(*asked, *asked_base, return_exceptions=True)
        adapter = [value for task in asked for value in task.result()]
        base = [value for task in asked_base for value in task.result()]
        return judge_probe(adapter, base, [value for prompt in reference.prompts for value in prompt.adapter])

    async def _ask(self, model: str, prompt: ReferencePrompt) -> list[float]:
        async with self._room:
            return await self._admin.first_token(model, prompt.token_ids, prompt.candidates)

    async def _ask_base(self, prompt: ReferencePrompt) -> list[float]:
        key = (prompt.token_ids, prompt.candidates)
        if key not in self._base:
            self._base[key] = await self._ask(self._admin.base_model, prompt)
        return self._base[key]
