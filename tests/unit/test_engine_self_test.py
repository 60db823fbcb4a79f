"""Judging an engine's self-test at the noise that processors have, and the adapter that it is made with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gateway.engine.self_test import judge_self_test, write_adapter

PROMPTS, CANDIDATES = 8, 20
NOISES = (0.0, 0.2, 0.5)
SEEDS = range(25)
EFFECTS = (2.0, 9.0)  # of the test adapter, root mean square: gentle, and as on the model of the demo


class Engine:
    """Base and adapter as an engine answers them whose rounding depends on the size of the batch."""

    def __init__(self, seed: int, *, noise: float, effect: float) -> None:
        self.draw = np.random.default_rng(seed)
        self.base = self.draw.uniform(-12, -1, (PROMPTS, CANDIDATES))
        self.adapter = self.base + self.draw.normal(0, effect, (PROMPTS, CANDIDATES))
        self.by_size = {
            size: self.draw.uniform(-noise, noise, (PROMPTS, CANDIDATES)) if size > 1 else 0 * self.base
            for size in range(1, 30)
        }

    def round(self, size: int, *, leak: float = 0.0, rows: int = PROMPTS) -> list[list[float]]:
        """Base's answers in batches of this size, with so much of the adapter in the first rows."""
        share = np.where(np.arange(PROMPTS)[:, None] < rows, leak, 0.0)
        mixed: list[list[float]] = (self.base + share * (self.adapter - self.base) + self.by_size[size]).tolist()
        return mixed

    def judge(self, beside_adapters: list[list[list[float]]]) -> str | None:
        beside_base = [self.round(12), self.round(12), self.round(11)]
        found = judge_self_test(self.base.tolist(), self.adapter.tolist(), beside_base, beside_adapters)
        return found.fault.code if found.fault else None


@pytest.mark.invariant(3)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("effect", EFFECTS)
def test_passes_at_any_noise_in_batches_that_were_seen_before_and_in_others(noise: float, effect: float) -> None:
    for seed in SEEDS:
        engine = Engine(seed, noise=noise, effect=effect)

        assert engine.judge([engine.round(12), engine.round(9), engine.round(5)]) is None


@pytest.mark.invariant(3)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("size", [12, 9], ids=["a batch seen before", "another"])
@pytest.mark.parametrize("leak", [0.5, -0.5, 1.0])
def test_finds_an_adapter_at_half_strength_in_one_round(noise: float, effect: float, size: int, leak: float) -> None:
    for seed in SEEDS:
        engine = Engine(seed, noise=noise, effect=effect)

        assert engine.judge([engine.round(12), engine.round(size, leak=leak)]) == "self_test_failed"


@pytest.mark.invariant(3)
@pytest.mark.parametrize("noise", NOISES)
def test_passes_when_some_answers_of_a_round_come_from_batches_never_seen(noise: float) -> None:
    """Though the adapter does no more than the noise: what stands out of a round need not be a leak."""
    for seed in SEEDS:
        engine = Engine(seed, noise=noise, effect=0.36)

        assert engine.judge([[*engine.round(12)[:6], *engine.round(size)[6:]] for size in (9, 5, 3)]) is None


@pytest.mark.invariant(3)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("size", [12, 9], ids=["a batch seen before", "another"])
def test_finds_a_leak_into_one_row(noise: float, size: int) -> None:
    for seed in SEEDS:
        engine = Engine(seed, noise=noise, effect=9.0)

        assert engine.judge([engine.round(size, leak=0.5, rows=1)]) == "self_test_failed"


@pytest.mark.invariant(3)
@pytest.mark.parametrize("noise", NOISES)
def test_like_with_like_finds_an_adapter_that_does_less_than_the_noise(noise: float) -> None:
    for seed in SEEDS:
        engine = Engine(seed, noise=noise, effect=0.2)

        assert engine.judge([engine.round(12), engine.round(11)]) is None
        assert engine.judge([engine.round(12, leak=0.5)]) == "self_test_failed"


@pytest.mark.invariant(3)
@pytest.mark.parametrize("noise", NOISES)
def test_finds_an_adapter_that_leaks_though_nobody_uses_it(noise: float) -> None:
    engine = Engine(1, noise=noise, effect=2.0)
    leaking = [engine.round(12, leak=0.5)]

    found = judge_self_test(engine.base.tolist(), engine.adapter.tolist(), leaking, leaking)

    assert found.fault is not None
    assert found.fault.code == "self_test_failed"


@pytest.mark.invariant(3)
def test_finds_rubbish_in_base_that_is_not_the_adapters() -> None:
    engine = Engine(0, noise=0.2, effect=5.0)
    rubbish = (engine.base + engine.draw.normal(0, 5, engine.base.shape)).tolist()

    assert engine.judge([rubbish]) == "self_test_failed"


@pytest.mark.invariant(3)
def test_a_test_that_proves_nothing_does_not_pass() -> None:
    engine = Engine(0, noise=0.0, effect=0.01)
    strong = Engine(0, noise=0.0, effect=5.0)

    assert engine.judge([engine.round(12)]) == "self_test_void"
    assert strong.judge([]) == "self_test_void"


def test_measures_the_engines_noise_and_says_all_numbers() -> None:
    engine = Engine(3, noise=0.3, effect=5.0)
    alone, adapter = engine.base.tolist(), engine.adapter.tolist()

    found = judge_self_test(alone, adapter, [engine.round(12)], [engine.round(12, leak=0.5)])

    assert found.batch_noise == pytest.approx(0.3, abs=0.02)
    assert found.fault is not None
    assert "base in company has 50% of the test adapter in it" in found.fault.reason
    assert f"base beside base by {found.batch_noise:.3f}" in found.fault.reason


def test_the_test_adapter_is_made_once_and_fits_the_base(tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.down_proj": (8, 16), "model.layers.0.self_attn.q_proj": (8, 8)}

    directory = write_adapter(tmp_path, shapes)
    before = (directory / "adapter_model.safetensors").stat().st_mtime_ns

    assert write_adapter(tmp_path, shapes) == directory
    assert (directory / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert json.loads((directory / "adapter_config.json").read_text())["target_modules"] == ["down_proj"]
    assert write_adapter(tmp_path, {"model.layers.0.mlp.down_proj": (8, 32)}) != directory
