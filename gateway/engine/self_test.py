"""On every start of an engine: does a base-model request beside an adapter get the base model's own answer?

The CPU build of vLLM 0.32 reads the last adapter slot for rows without an adapter, so the test fills every slot. Its
adapter is made here, tiny and violent: whatever of it leaked into the base model would move log-probabilities by nats.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from .admin import EngineAdmin
from .probe import Fault

NAME_PREFIX = "turnout-selftest"
# Base alone against base in a mixed batch measured exactly 0 where nothing leaks; the test adapter moves nats.
MAX_LEAK_NATS = 0.05
MIN_ADAPTER_EFFECT_NATS = 0.25
_PROMPTS = tuple(tuple((7 * place + 31 * number) % 500 + 20 for place in range(12)) for number in range(4))
_CANDIDATES = tuple(range(20, 40))
# How long the company speaks: the second figure is for an engine so fast that it had finished before base answered.
_COMPANY_TOKENS = (24, 400)
_PATTERNS = ("down_proj", "o_proj", "fc2", "c_proj", "dense_4h_to_h")
_RANK = 1
_SCALE = 8


def self_test_name(directory: Path, slot: int) -> str:
    """The name that the engine knows the test adapter of one slot by."""
    return f"{NAME_PREFIX}.{directory.name}.{slot}"


def write_adapter(parent: Path, shapes: Mapping[str, tuple[int, int]]) -> Path:
    """Make the test adapter for a base model with these linear layers; the same layers give the same directory."""
    layers = _layers(shapes)
    identity = hashlib.sha256(json.dumps([(name, shapes[name]) for name in layers]).encode()).hexdigest()[:12]
    directory = parent / identity
    if directory.is_dir():
        return directory
    rng = np.random.default_rng(0)
    tensors = {}
    for layer in layers:
        outputs, inputs = shapes[layer]
        a = rng.standard_normal((_RANK, inputs)) / np.sqrt(inputs)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = rng.choice((-1.0, 1.0), (outputs, _RANK)).astype(
            np.float32
        )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": _RANK,
        "lora_alpha": _SCALE * _RANK,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
    }
    unfinished = parent / f"{identity}.new"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(tensors, unfinished / "adapter_model.safetensors")
    (unfinished / "adapter_config.json").write_text(json.dumps(config))
    unfinished.replace(directory)
    return directory


def _layers(shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    for pattern in _PATTERNS:
        if found := sorted(name for name in shapes if name.rpartition(".")[2] == pattern):
            return found
    return sorted(shapes)[-1:]


def judge_self_test(
    alone: Sequence[float], beside: Sequence[Sequence[float]], adapter: Sequence[float]
) -> Fault | None:
    """Compare base alone, base in company (each time it was asked), and the company itself."""
    effect = max(abs(a - b) for a, b in zip(adapter, alone, strict=True))
    if effect < MIN_ADAPTER_EFFECT_NATS:
        reason = f"the test adapter has no effect ({effect:.3f} nats), so the test proves nothing"
        return Fault(code="self_test_void", reason=reason)
    if not beside:
        return Fault(
            code="self_test_void", reason="base was never answered beside an adapter, so the test proves nothing"
        )
    leak = max(abs(a - b) for asked in beside for a, b in zip(asked, alone, strict=True))
    if leak > MAX_LEAK_NATS:
        reason = (
            f"base beside an adapter differs from base alone by {leak:.3f} nats, allowed {MAX_LEAK_NATS}: adapters leak "
            "into the base model; is the plugin turnout_base_rows installed?"
        )
        return Fault(code="self_test_failed", reason=reason)
    return None


async def run_self_test(admin: EngineAdmin, directory: Path, slots: int) -> Fault | None:
    """Load the test adapter into every slot, ask base alone and in company, unload. None when base stays base."""
    names = [self_test_name(directory, slot) for slot in range(slots)]
    loaded = await admin.models()
    try:
        for name in names:
            if name not in loaded:
                await admin.load(name, directory)
        alone = await _ask(admin, admin.base_model)
        adapter = await _ask(admin, names[0])
        beside = await _ask_in_company(admin, names[0])
    finally:
        for name in names:
            await admin.unload(name)
    return judge_self_test(alone, beside, adapter)


async def _ask(admin: EngineAdmin, model: str) -> list[float]:
    return [value for prompt in _PROMPTS for value in await admin.first_token(model, prompt, _CANDIDATES)]


async def _ask_in_company(admin: EngineAdmin, name: str) -> list[list[float]]:
    """Base's answers, round after round, while an adapter generates: a round that ended first shared its batches."""
    rounds: list[list[float]] = []
    for max_tokens in _COMPANY_TOKENS:
        company = asyncio.ensure_future(admin.generate(name, _PROMPTS[0], max_tokens=max_tokens))
        try:
            while not company.done():
                asked = (admin.first_token(admin.base_model, prompt, _CANDIDATES) for prompt in _PROMPTS)
                found = [value for answer in await asyncio.gather(*asked) for value in answer]
                if not company.done():
                    rounds.append(found)
            await company
        finally:
            company.cancel()
        if rounds:
            break
    return rounds
