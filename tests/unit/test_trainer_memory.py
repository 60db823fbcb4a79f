"""The estimate adds up, grows with what it should grow with, and refuses with its arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config import SFTConfig
from trainer.errors import BadConfig, DoesNotFit
from trainer.memory import ModelShape, available_bytes, estimate, read_shape, require_memory

CONFIG = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def a_shape(directory: Path, **changes: Any) -> ModelShape:
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return read_shape(directory, precision_bytes=2)


def a_config(**changes: Any) -> SFTConfig:
    return SFTConfig.model_validate({"adapter": "support", "dataset": "train.jsonl", **changes})


def test_sizes_of_the_demos_base_are_read_off_its_config(tmp_path: Path) -> None:
    shape = a_shape(tmp_path)

    assert shape.weights_bytes == pytest.approx(269_030_016, rel=1e-3)  # model.safetensors without its norms
    assert shape.linear_sizes * 16 == 4_884_480  # weights of an adapter of rank 16 on every linear layer


def test_an_untied_head_is_counted(tmp_path: Path) -> None:
    tied, untied = a_shape(tmp_path), a_shape(tmp_path, tie_word_embeddings=False)

    assert untied.weights_bytes - tied.weights_bytes == 2 * 576 * 49152


@pytest.mark.parametrize(
    "bigger", [{"batch_size": 16}, {"rank": 32}, {"attention": "eager"}, {"gradient_checkpointing": False}]
)
def test_it_grows_with_what_costs_memory(tmp_path: Path, bigger: dict[str, Any]) -> None:
    smaller = a_config(batch_size=8, rank=16, attention="sdpa", gradient_checkpointing=True)
    shape = a_shape(tmp_path)

    more = estimate(smaller.model_copy(update=bigger), shape, longest=256)

    assert more.total > estimate(smaller, shape, longest=256).total


def test_eager_attention_grows_faster_than_the_rows(tmp_path: Path) -> None:
    shape, config = a_shape(tmp_path), a_config()

    short, long = (estimate(config, shape, longest=tokens).activations for tokens in (128, 1024))

    assert long > 8 * short


def test_what_does_not_fit_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    needed = estimate(a_config(), a_shape(tmp_path), longest=512)

    with pytest.raises(
        DoesNotFit, match=r"runtime \+ .* activations .* = [0-9.]+ GiB, and 1.00 GiB are free: lower batch_size"
    ) as caught:
        require_memory(needed, 2**30)

    assert caught.value.code == "insufficient_memory"


def test_what_fits_is_let_through(tmp_path: Path) -> None:
    needed = estimate(a_config(), a_shape(tmp_path), longest=128)

    require_memory(needed, 2 * needed.total)


def test_the_terms_are_the_total(tmp_path: Path) -> None:
    needed = estimate(a_config(), a_shape(tmp_path), longest=128)

    assert needed.total == needed.runtime + needed.base + needed.adapter + needed.activations + needed.vocabulary


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hidden_size": "x"}'])
def test_a_config_that_says_no_sizes_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(BadConfig, match=r"config\.json cannot be read"):
        read_shape(tmp_path, precision_bytes=2)


def test_this_machine_has_some_memory() -> None:
    assert 0 < available_bytes() < 2**50
