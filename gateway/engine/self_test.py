"""On every start of an engine: does a base-model request beside adapters get the base model's own answer?

The CPU build of vLLM 0.32 reads the last adapter slot for rows without an adapter, so the test fills every slot. Its
adapter is made here, tiny and violent: whatever of it leaked into the base model would move log-probabilities by nats.

Like is compared with like. On some processors an answer depends on the size of the batch it was computed in, by tenths
of a nat, so base alone says nothing of base in company: the same requests are asked at once beside generating *base*
requests, and then beside generating *adapters*. What the first differ by from base alone is the engine's own noise.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from ..settings import EngineSettings
from .admin import EngineAdmin
from .probe import Fault

NAME_PREFIX = "turnout-selftest"
# A change of base by this share of what the adapter does is a leak: half of the least that matters, an adapter at half
# strength. Where nothing leaks and a batch of the same shape was seen before, it measured exactly 0.
MAX_LEAK = 0.25
# A single answer may differ by this many times the engine's own noise: no batch of its shape may have been seen before.
_NOISE_MARGIN = 2.0
# Standard errors by which a share must exceed what chance alone would give.
_SURE = 3.0
MIN_EFFECT_NATS = 0.1
_PROMPTS = tuple(tuple((7 * place + 31 * number) % 500 + 20 for place in range(12)) for number in range(8))
_CANDIDATES = tuple(range(20, 40))
_ROUNDS = 4
_MOST_COMPANY = 4
# How long the company could speak; it is stopped after the rounds. The second figure is for an engine so fast that it
# had finished before base answered.
_COMPANY_TOKENS = (256, 1024)
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


Answers = Sequence[Sequence[float]]  # prompt x candidate, nats


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What a self-test found. Differences in nats, the largest of all prompts and candidates."""

    fault: Fault | None
    batch_noise: float = 0.0  # base in company of base against base alone
    leak: float = 0.0  # base in company of adapters against its nearest answer without them
    effect: float = 0.0  # what the adapter does, root mean square


def judge_self_test(
    alone: Answers, adapter: Answers, beside_base: Sequence[Answers], beside_adapters: Sequence[Answers]
) -> SelfTest:
    """Compare base alone, the adapter alone, and each round of base in company of base, and of adapters."""
    base, effects = np.asarray(alone), np.asarray(adapter) - np.asarray(alone)
    effect = float(_rms(effects))
    if effect < MIN_EFFECT_NATS:
        return _void(f"the test adapter has no effect ({effect:.3f} nats)")
    if not beside_base or not beside_adapters:
        return _void("base was never answered in company")
    known = np.stack([base, *map(np.asarray, beside_base)])
    noises = known[1:] - base
    rounds = [_unexplained(np.asarray(answers), known) for answers in beside_adapters]
    leak, noise = (float(max(np.abs(found).max() for found in kind)) for kind in (rounds, noises))
    # Base beside base is held to it too: an engine may leak what it has merely loaded.
    share = max((_share(found, effects) for found in (*rounds, *noises)), key=abs)
    fault = None
    if share or any(_has_odd_row(found, effects, float(_rms(noises))) for found in rounds):
        reason = (
            f"base in company has {share:.0%} of the test adapter in it (allowed {MAX_LEAK:.0%}; none: single answers do): it "
            f"moves by {leak:.3f} nats beside adapters, and base beside base by {noise:.3f}: adapters leak into the base "
            "model; is the plugin turnout_base_rows installed?"
        )
        fault = Fault(code="self_test_failed", reason=reason)
    return SelfTest(fault, batch_noise=noise, leak=leak, effect=effect)


def _void(why: str) -> SelfTest:
    return SelfTest(Fault(code="self_test_void", reason=f"{why}, so the test proves nothing"))


def _rms(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.asarray(np.sqrt(np.mean(np.square(values), axis=axis)))


def _share(found: np.ndarray, effects: np.ndarray) -> float:
    """How much of the adapter a round has in it, by least squares; 0 when that is within what is allowed or chance."""
    size = float((effects**2).sum())
    share = float((found * effects).sum()) / size
    error = float(_rms(found - share * effects)) / size**0.5
    return share if abs(share) > max(MAX_LEAK, _SURE * error) else 0.0


def _unexplained(answers: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What no answer without adapters accounts for: each prompt's distance to the nearest of them."""
    differences = answers - known  # round x prompt x candidate
    nearest = _rms(differences, axis=2).argmin(axis=0)
    found: np.ndarray = differences[nearest, np.arange(len(answers))]
    return found


def _has_odd_row(found: np.ndarray, effects: np.ndarray, noise: float) -> bool:
    """Whether some prompt of a round moved though the round as a whole did not: a leak into single rows of a batch."""
    # Rows of one round may have been computed in batches of several sizes, some of which were never seen before.
    allowed = np.maximum(MAX_LEAK * _rms(effects, axis=1), _NOISE_MARGIN * noise)
    return bool((_rms(found, axis=1) > allowed).any())


@dataclass(frozen=True, slots=True)
class _Scene:
    """How many answer at a time, so that all of them share the engine's batches, and how long the company may speak."""

    company: int
    width: int
    lengths: tuple[int, ...]

    @classmethod
    def within(cls, engine: EngineSettings) -> _Scene:
        """As the engine's limits allow."""
        company = min(_MOST_COMPANY, engine.max_loras, max(1, engine.max_num_seqs // 2))
        longest = engine.max_model_len - len(_PROMPTS[0])
        return cls(
            company,
            width=min(len(_PROMPTS), max(1, engine.max_num_seqs - company)),
            lengths=tuple(min(length, longest) for length in _COMPANY_TOKENS),
        )


async def run_self_test(admin: EngineAdmin, directory: Path, engine: EngineSettings) -> SelfTest:
    """Load the test adapter into every slot, ask base in company of base and of adapters, unload.

    An engine that decodes one sequence at a time mixes no batches: there is nothing to test.
    """
    if engine.max_num_seqs == 1:
        return SelfTest(None)
    scene = _Scene.within(engine)
    names = [self_test_name(directory, slot) for slot in range(engine.max_loras)]
    loaded = await admin.models()
    try:
        for name in names:
            if name not in loaded:
                await admin.load(name, directory)
        alone = await _ask(admin, admin.base_model, width=1)
        adapter = await _ask(admin, names[0], width=1)
        beside_base = await _ask_in_company(admin, [admin.base_model] * scene.company, scene)
        beside_adapters = await _ask_in_company(admin, names[-scene.company :], scene)
    finally:
        for name in names:
            await admin.unload(name)
    return judge_self_test(alone, adapter, beside_base, beside_adapters)


async def _ask(admin: EngineAdmin, model: str, *, width: int) -> list[list[float]]:
    """The answers to all prompts, so many at a time."""
    room = asyncio.Semaphore(width)

    async def one(prompt: Sequence[int]) -> list[float]:
        async with room:
            return await admin.first_token(model, prompt, _CANDIDATES)

    return await asyncio.gather(*map(one, _PROMPTS))


async def _ask_in_company(admin: EngineAdmin, models: Sequence[str], scene: _Scene) -> list[list[list[float]]]:
    """Base's answers, round after round, each of them given while all of the company generated."""
    rounds: list[list[list[float]]] = []
    for max_tokens in scene.lengths:
        async with _generating(admin, models, max_tokens) as company:
            while len(rounds) < _ROUNDS:
                found = await _ask(admin, admin.base_model, width=scene.width)
                if any(one.done() for one in company):
                    break
                rounds.append(found)
        if rounds:
            break
    return rounds


@asynccontextmanager
async def _generating(
    admin: EngineAdmin, models: Sequence[str], max_tokens: int
) -> AsyncIterator[list[asyncio.Task[str]]]:
    """A request of each model, generating; ended with the block. One that fails fails the block."""
    company = [
        asyncio.create_task(admin.generate(model, prompt, max_tokens=max_tokens))
        for model, prompt in zip(models, _PROMPTS, strict=False)
    ]
    try:
        yield company
        for one in company:
            if one.done():
                one.result()
    finally:
        for one in company:
            one.cancel()
        await asyncio.gather(*company, return_exceptions=True)
