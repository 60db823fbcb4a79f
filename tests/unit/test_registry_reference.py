"""Judging served log-probabilities against verified ones, at the noise that processors have."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Literal

import pytest

from gateway.registry.reference import Agreement, Logprobs, ReferencePrompt, compare

NOISES = (0.0, 0.2, 0.5)
SEEDS = range(40)


def some_prompts(draw: random.Random, *, effect: float = 1.0) -> list[ReferencePrompt]:
    """Sixteen prompts of ten candidates, each moved by the adapter by up to `effect` nats either way."""
    prompts = []
    for _ in range(16):
        base = tuple(draw.uniform(-9, -0.5) for _ in range(10))
        adapter = tuple(value + draw.uniform(-effect, effect) for value in base)
        prompts.append(ReferencePrompt(token_ids=(1,), candidates=tuple(range(10)), adapter=adapter, base=base))
    return prompts


def served(prompts: list[ReferencePrompt], draw: random.Random, *, strength: float, noise: float) -> Agreement:
    """What an engine that applies `strength` of the adapter, and rounds by up to `noise` nats, agrees to."""
    adapter = _answers(prompts, lambda b, a: b + strength * (a - b) + draw.uniform(-noise, noise))
    return compare(prompts, adapter, _answers(prompts, lambda b, a: b + draw.uniform(-noise, noise)))


def _answers(prompts: list[ReferencePrompt], value: Callable[[float, float], float]) -> Logprobs:
    return [[value(b, a) for b, a in zip(prompt.base, prompt.adapter, strict=True)] for prompt in prompts]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(("strength", "judged"), [(0.0, "wrong"), (0.5, "wrong"), (1.0, "whole"), (2.0, "wrong")])
def test_tells_the_strength_of_what_is_served_at_any_noise(
    noise: float, strength: float, judged: Literal["wrong", "whole"]
) -> None:
    for seed in SEEDS:
        draw = random.Random(seed)

        found = served(some_prompts(draw, effect=3.0), draw, strength=strength, noise=noise)

        assert found.strength == judged, str(found)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, 2.0])
def test_an_effect_no_larger_than_the_noise_is_never_judged_the_other_way(noise: float, strength: float) -> None:
    opposite = "wrong" if strength == 1.0 else "whole"
    for seed in SEEDS:
        draw = random.Random(seed)

        found = served(some_prompts(draw, effect=0.5), draw, strength=strength, noise=noise)

        assert found.strength != opposite, str(found)


@pytest.mark.parametrize("noise", NOISES)
def test_an_innocent_adapter_is_within_the_allowed_gap(noise: float) -> None:
    for seed in SEEDS:
        draw = random.Random(seed)

        found = served(some_prompts(draw), draw, strength=1.0, noise=noise)

        assert found.gap <= found.allowed_gap(0.25), str(found)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_an_effect_that_drowns_in_the_noise_is_called_neither_right_nor_wrong_without_evidence(strength: float) -> None:
    """A hundredth of the noise: whatever is said of it once in 40 times is chance."""
    judged = []
    for seed in SEEDS:
        draw = random.Random(seed)
        judged.append(served(some_prompts(draw, effect=0.005), draw, strength=strength, noise=0.5).strength)

    assert judged.count("unclear") >= 38


def test_noise_that_a_prompts_candidates_share_makes_it_less_sure() -> None:
    draw = random.Random(0)
    prompts = some_prompts(draw)
    shifts = [draw.uniform(-1, 1) for _ in prompts]
    adapter = [[a + shift for a in prompt.adapter] for prompt, shift in zip(prompts, shifts, strict=True)]
    base = [list(prompt.base) for prompt in prompts]

    shared, quiet = compare(prompts, adapter, base), compare(prompts, [list(p.adapter) for p in prompts], base)

    assert quiet.slope_error < 1e-9
    assert shared.slope_error > 0.02


def test_one_prompt_alone_makes_nothing_sure() -> None:
    prompt = ReferencePrompt(token_ids=(1,), candidates=(1, 2), adapter=(-1, -2), base=(-2, -1))

    assert compare([prompt], [[-1, -2]], [[-2, -1]]).strength == "unclear"


def test_says_every_number_it_used() -> None:
    draw = random.Random(1)

    said = str(served(some_prompts(draw), draw, strength=0.5, noise=0.0))

    assert "served change is 0.50 ± 0.00 of the verified one" in said
    assert "16 prompts" in said
