"""Pre-flight against the whole corpus, and what good adapters look like."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gateway.errors import Refused
from gateway.registry import preflight as module
from gateway.registry.base_family import BaseFamily
from gateway.registry.manifest import MAX_STRUCTURE
from gateway.registry.preflight import preflight
from gateway.registry.reasons import REASONS
from tests.corpus import BAD, CONFIG, WEIGHTS, lora_weights, make_adapter, make_base, make_bundle, write_safetensors

STATIC = sorted(name for name, bad in BAD.items() if bad.refused_by == "preflight")
ONLY_RUNNING_SHOWS = sorted(name for name, bad in BAD.items() if bad.refused_by == "verify")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFamily:
    return make_base(tmp_path_factory.mktemp("bases") / "smollm9-tiny-instruct", name="tiny")


def refusal_of(directory: Path, base: BaseFamily) -> Refused:
    with pytest.raises(Refused) as caught:
        preflight(directory, base, max_rank=16)
    return caught.value


@pytest.mark.invariant(4)
@pytest.mark.parametrize("kind", STATIC)
def test_refuses_every_bad_adapter_with_its_reason(tmp_path: Path, base: BaseFamily, kind: str) -> None:
    BAD[kind].build(tmp_path / "bad", base)

    refused = refusal_of(tmp_path / "bad", base)

    assert refused.code == BAD[kind].code
    assert refused.code in REASONS
    assert len(refused.message) > 20


@pytest.mark.parametrize("kind", ONLY_RUNNING_SHOWS)
def test_leaves_to_verification_what_only_running_shows(tmp_path: Path, base: BaseFamily, kind: str) -> None:
    BAD[kind].build(tmp_path / "bad", base)

    assert preflight(tmp_path / "bad", base, max_rank=16).rank == 8


@pytest.mark.mutant(4)
def test_mutant_without_the_check_of_values_a_nan_adapter_passes(
    tmp_path: Path, base: BaseFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    BAD["all_nan"].build(tmp_path / "bad", base)
    monkeypatch.setattr(module, "_check_values", lambda descriptor, modules: None)

    assert preflight(tmp_path / "bad", base, max_rank=16).rank == 8


def test_no_pickle_is_executed(tmp_path: Path, base: BaseFamily) -> None:
    BAD["pickle_beside"].build(tmp_path / "bad", base)

    refusal_of(tmp_path / "bad", base)

    assert not (tmp_path / "bad" / "planted").exists()


def test_every_reason_is_a_sentence_and_the_corpus_knows_most() -> None:
    assert all(text.endswith(".") and text[0].isupper() for text in REASONS.values())
    known = {bad.code for bad in BAD.values() if bad.refused_by == "preflight"}
    assert known <= REASONS.keys()
    assert REASONS.keys() - known == {"too_large"}  # its test below makes the cap small instead of the file large


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_accepts_every_served_precision(tmp_path: Path, base: BaseFamily, dtype: str) -> None:
    make_adapter(tmp_path / "good", base, dtype=dtype)

    checked = preflight(tmp_path / "good", base, max_rank=16)

    assert (checked.rank, checked.alpha, checked.target_modules) == (8, 16, ("q_proj", "v_proj"))
    assert checked.manifest is None


def test_the_canonical_config_names_no_path_and_nothing_that_peft_imports(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(
        tmp_path / "good", base, auto_mapping={"base_model_class": "Planted", "parent_library": "planted.module"},
        megatron_core="planted.module", megatron_config={"x": 1}, runtime_config={"ephemeral_gpu_offload": True},
    )  # fmt: skip

    config = preflight(tmp_path / "good", base, max_rank=16).config

    assert config == {
        "alpha_pattern": {}, "base_model_name_or_path": "tiny", "bias": "none", "fan_in_fan_out": False, "lora_alpha": 16,
        "peft_type": "LORA", "r": 8, "rank_pattern": {}, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "use_rslora": False,
    }  # fmt: skip


def test_the_digest_ignores_order_paths_and_training_settings(tmp_path: Path, base: BaseFamily) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    make_adapter(tmp_path / "good", base, modules=targets)
    config = json.loads((tmp_path / "good" / CONFIG).read_text())
    digests = set()
    for seed in range(10):
        shuffle = random.Random(seed)
        keys = shuffle.sample(sorted(config), len(config))
        written = {key: config[key] for key in keys}
        written["target_modules"] = shuffle.sample(targets, len(targets))
        written["base_model_name_or_path"] = f"/home/user{seed}/base"
        written["lora_dropout"] = seed / 100
        written["lora_alpha"] = 16.0 if seed % 2 else 16
        (tmp_path / "good" / CONFIG).write_text(json.dumps(written, indent=seed))
        digests.add(preflight(tmp_path / "good", base, max_rank=16).digest)

    assert len(digests) == 1


def test_the_canonical_bundle_passes_and_keeps_its_digest(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "good", base, rank_pattern={"k_proj": 8}, alpha_pattern={"layers.1.self_attn.q_proj": 4})
    first = preflight(tmp_path / "good", base, max_rank=16)
    (tmp_path / "good" / CONFIG).write_bytes(first.config_bytes)

    again = preflight(tmp_path / "good", base, max_rank=16)

    assert (again.digest, again.config) == (first.digest, first.config)
    assert first.config["alpha_pattern"] == {"model.layers.1.self_attn.q_proj": 4}
    assert first.config["rank_pattern"] == {}  # it says what holds anyway


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 32}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 8}}], ids=["alpha", "rslora", "pattern"]
)  # fmt: skip
def test_the_digest_changes_with_the_scaling(tmp_path: Path, base: BaseFamily, change: dict[str, Any]) -> None:
    make_adapter(tmp_path / "one", base)
    make_adapter(tmp_path / "two", base, **change)

    assert (
        preflight(tmp_path / "one", base, max_rank=16).digest != preflight(tmp_path / "two", base, max_rank=16).digest
    )


def test_the_digest_changes_with_one_bit_of_the_weights(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "good", base)
    first = preflight(tmp_path / "good", base, max_rank=16).digest
    content = bytearray((tmp_path / "good" / WEIGHTS).read_bytes())
    content[-4] ^= 1
    (tmp_path / "good" / WEIGHTS).write_bytes(content)

    assert preflight(tmp_path / "good", base, max_rank=16).digest != first


def test_ranks_may_differ_by_layer_when_the_config_says_so(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "good", base, rank_pattern={"layers.1.self_attn.v_proj": 4, "v_proj": 2})
    tensors = lora_weights(base, seed=0, rank=8, scaling=2, scale=0.3, modules=("q_proj", "v_proj"))
    for name, (dtype, values) in tensors.items():
        if "v_proj" in name:
            rank = 4 if "layers.1" in name else 2
            tensors[name] = (dtype, values[:rank] if "lora_A" in name else values[:, :rank].copy())
    write_safetensors(tmp_path / "good" / WEIGHTS, tensors)

    checked = preflight(tmp_path / "good", base, max_rank=16)

    assert checked.config["rank_pattern"] == {
        "model.layers.0.self_attn.v_proj": 2, "model.layers.1.self_attn.v_proj": 4,
    }  # fmt: skip
    assert checked.rank == 8


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.(q|v)_proj", ["q_proj", "v_proj"], ["self_attn.q_proj", "v_proj"]]
)
def test_layers_may_be_named_in_any_of_pefts_ways(tmp_path: Path, base: BaseFamily, targets: object) -> None:
    make_adapter(tmp_path / "good", base, target_modules=targets)

    assert preflight(tmp_path / "good", base, max_rank=16).target_modules == ("q_proj", "v_proj")


def test_some_layers_only_are_named_by_their_full_path(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "good", base, layers_to_transform=[1])
    tensors = lora_weights(base, seed=0, rank=8, scaling=2, scale=0.3, modules=("q_proj", "v_proj"))
    write_safetensors(
        tmp_path / "good" / WEIGHTS, {name: value for name, value in tensors.items() if "layers.1" in name}
    )

    checked = preflight(tmp_path / "good", base, max_rank=16)

    assert checked.target_modules == ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")


@pytest.mark.parametrize(
    "declared",
    [None, "", "tiny", "/tmp/checkpoints/base", "smollm9-tiny-instruct", "HuggingFaceTB/SmolLM9-Tiny-Instruct",
     "unsloth/SmolLM9-Tiny-Instruct-bnb-4bit", "C:\\models\\smollm9-tiny-instruct\\", "../philosophy"],
)  # fmt: skip
def test_accepts_its_base_under_any_name_and_folders_that_say_nothing(
    tmp_path: Path, base: BaseFamily, declared: str | None
) -> None:
    make_adapter(tmp_path / "good", base, base_model_name_or_path=declared)

    assert preflight(tmp_path / "good", base, max_rank=16).config["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize(
    "declared",
    [
        "HuggingFaceTB/SmolLM9-Tiny",
        "meta-llama/Llama-3.2-1B",
        "/models/qwen2.5-0.5b-instruct",
        "gpt2",
        "google/gemma-3-270m",
    ],
)
def test_refuses_another_models_name(tmp_path: Path, base: BaseFamily, declared: str) -> None:
    make_adapter(tmp_path / "bad", base, base_model_name_or_path=declared)

    refused = refusal_of(tmp_path / "bad", base)

    assert refused.code == "wrong_base"
    assert declared in refused.message


def test_a_manifest_with_the_bases_digest_outweighs_the_name(tmp_path: Path, base: BaseFamily) -> None:
    make_bundle(tmp_path / "good", base, base_model_name_or_path="org/SmolLM9-Tiny")

    assert preflight(tmp_path / "good", base, max_rank=16).manifest is not None


def test_a_saved_tokenizer_may_differ_in_padding_only(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "good", base)
    tokenizer = json.loads((base.path / "tokenizer.json").read_text())
    (tmp_path / "good" / "tokenizer.json").write_text(
        json.dumps({**tokenizer, "padding": {"strategy": "BatchLongest"}}, indent=1)
    )
    (tmp_path / "good" / "chat_template.jinja").write_bytes((base.path / "chat_template.jinja").read_bytes())

    assert preflight(tmp_path / "good", base, max_rank=16).rank == 8


def test_other_files_are_never_opened(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "good", base)
    os.mkfifo(tmp_path / "good" / "training_args.bin")  # opening it would block for ever
    (tmp_path / "good" / "README.md").symlink_to("/etc/passwd")

    assert preflight(tmp_path / "good", base, max_rank=16).rank == 8


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "manifest.json", "tokenizer.json"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path: Path, base: BaseFamily, name: str) -> None:
    make_adapter(tmp_path / "bad", base)
    (tmp_path / "bad" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "bad" / name)

    assert refusal_of(tmp_path / "bad", base).code == "not_a_file"


@pytest.mark.parametrize(
    "make", [lambda path, good: path.symlink_to(good), lambda path, good: path.write_text("x"), lambda path, good: None]
)
def test_the_source_must_be_a_real_directory(
    tmp_path: Path, base: BaseFamily, make: Callable[[Path, Path], object]
) -> None:
    make_adapter(tmp_path / "good", base)
    make(tmp_path / "source", tmp_path / "good")

    assert refusal_of(tmp_path / "source", base).code == "not_a_file"


def test_files_have_caps(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "big", base)
    with pytest.raises(Refused) as caught:
        preflight(tmp_path / "big", base, max_rank=16, max_weights_bytes=1000)
    assert caught.value.code == "too_large"

    (tmp_path / "big" / CONFIG).write_bytes(b" " * (2**20 + 1))

    assert refusal_of(tmp_path / "big", base).code == "too_large"


@pytest.mark.parametrize(
    "text", ['{"r": 8, "r": 4}', '{"r": NaN}', '{"r": 1e999}', '{"a": "\\ud800"}', "[" * 100_000, "nul", ""],
    ids=["key twice", "NaN", "overflow", "half a pair", "deep", "cut", "empty"],
)  # fmt: skip
def test_json_that_readers_disagree_on_is_refused(tmp_path: Path, base: BaseFamily, text: str) -> None:
    for name, code in ((CONFIG, "bad_config"), ("manifest.json", "bad_manifest")):
        make_adapter(tmp_path / "bad", base)
        (tmp_path / "bad" / name).write_text(text)

        assert refusal_of(tmp_path / "bad", base).code == code
        (tmp_path / "bad" / name).unlink()


def test_a_tensor_name_with_a_line_end_is_not_taken_for_the_layers(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "bad", base)
    tensors = lora_weights(base, seed=0, rank=8, scaling=2, scale=0.3, modules=("q_proj", "v_proj"))
    name = next(iter(tensors))
    write_safetensors(tmp_path / "bad" / WEIGHTS, {**tensors, name + "\n": tensors[name]})

    assert refusal_of(tmp_path / "bad", base).code == "unknown_tensor"


def test_memory_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    base = make_base(tmp_path / "base", layers=40, hidden=256)
    make_adapter(
        tmp_path / "good",
        base,
        modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        rank=16,
    )
    size = (tmp_path / "good" / WEIGHTS).stat().st_size
    tracemalloc.start()

    preflight(tmp_path / "good", base, max_rank=16)

    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 10 * 2**20
    assert peak < size / 2


def test_work_grows_no_faster_than_the_number_of_pattern_keys(tmp_path: Path, base: BaseFamily) -> None:
    calls = {count: calls_with_pattern_keys(tmp_path / str(count), base, count) for count in (350, 3_500)}

    assert calls[3_500] < 11 * calls[350]


def calls_with_pattern_keys(folder: Path, base: BaseFamily, count: int) -> int:
    """Calls of functions, ours and the interpreter's, that a pre-flight makes."""
    make_adapter(folder, base, rank_pattern={f"layers.{index}.nothing": 4 for index in range(count)})
    calls = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        found = preflight(folder, base, max_rank=16)
    finally:
        sys.setprofile(None)
    assert found.config["rank_pattern"] == {}
    return calls


def test_more_pattern_keys_than_any_adapter_has_are_refused_by_their_number(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "bad", base, rank_pattern={f"layers.{index}.nothing": 4 for index in range(20_000)})

    refused = refusal_of(tmp_path / "bad", base)

    assert refused.code == "bad_config"
    assert f"{MAX_STRUCTURE:,}" in refused.message


def test_scales_are_checked_where_they_apply(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "bad", base, alpha_pattern={"layers.1.self_attn.q_proj": 1e12})

    refused = refusal_of(tmp_path / "bad", base)

    assert refused.code == "magnitude"
    assert "model.layers.1.self_attn.q_proj" in refused.message


def test_values_at_the_bound_pass(tmp_path: Path, base: BaseFamily) -> None:
    make_adapter(tmp_path / "good", base)
    tensors = lora_weights(base, seed=0, rank=8, scaling=2, scale=0.3, modules=("q_proj", "v_proj"))
    name, (dtype, values) = next(iter(tensors.items()))
    tensors[name] = (dtype, np.full_like(values, 1e3))
    write_safetensors(tmp_path / "good" / WEIGHTS, tensors)

    assert preflight(tmp_path / "good", base, max_rank=16).rank == 8
