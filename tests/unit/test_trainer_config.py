"""Every knob is typed, documented and refused when it is wrong; presets load; nothing of it loads torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.names import NAME_PATTERN
from trainer import config as trainer_config
from trainer.config import SFTConfig, load_config, parse_config, presets
from trainer.environment import training_environment
from trainer.errors import BadConfig
from trainer.recipes import RECIPES


def a_config(**changes: Any) -> SFTConfig:
    return SFTConfig.model_validate({"adapter": "support", "dataset": "train.jsonl", **changes})


def test_a_name_that_the_registry_takes_is_taken_here() -> None:
    assert trainer_config.NAME_PATTERN == NAME_PATTERN


def test_an_unknown_key_is_refused_by_name() -> None:
    with pytest.raises(
        BadConfig, match=r"learning_rte is no setting of the trainer; it knows .*learning_rate"
    ) as caught:
        parse_config({"adapter": "support", "dataset": "x", "learning_rte": 1e-3}, source="my.yaml")

    assert caught.value.code == "bad_config"


def test_a_missing_key_says_how_to_give_it() -> None:
    with pytest.raises(BadConfig, match=r"dataset is missing: set it in the preset, or with --set dataset="):
        parse_config({"adapter": "support"}, source="my.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adapter", "Support"), ("adapter", "../x"), ("rank", 0), ("rank", 513), ("learning_rate", 0), ("epochs", -1),
        ("dropout", 1), ("batch_size", 0), ("scheduler", "polynomial"), ("precision", "fp16"), ("attention", "flash"),
        ("seed", -1), ("max_length", 4), ("parent", "support"), ("target_modules", []), ("target_modules", ["lm_head"]),
        ("target_modules", ["q_proj", "model.lm_head"]), ("recipe", "dpo"), ("learning_rate", float("nan")),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused_by_name_and_value(key: str, value: object) -> None:
    with pytest.raises(BadConfig, match=re.escape(key)) as caught:
        parse_config({"adapter": "support", "dataset": "x", key: value}, source="my.yaml")

    assert str(value) in caught.value.message or repr(value) in caught.value.message


def test_patience_without_held_out_rows_is_refused() -> None:
    with pytest.raises(BadConfig, match="patience needs validation"):
        parse_config({"adapter": "support", "dataset": "x", "patience": 2}, source="my.yaml")


def test_overrides_win_over_the_preset(tmp_path: Path) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("adapter: support\ndataset: train.jsonl\nrank: 8\n")

    config = load_config(
        preset, ["rank=32", "learning_rate=1e-4", "target_modules=[v_proj, q_proj]", "validation=v.jsonl"]
    )

    assert (config.rank, config.learning_rate, config.validation) == (32, 1e-4, Path("v.jsonl"))
    assert config.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize("override", ["rank", "=8", "rank=[", "ranks=8"])
def test_a_bad_override_is_refused(override: str) -> None:
    with pytest.raises(BadConfig):
        load_config("sft", [override])


def test_a_preset_that_is_nowhere_is_refused_with_those_that_are() -> None:
    with pytest.raises(BadConfig, match=r"no preset 'nope': give a file, or one of .*sft"):
        load_config("nope")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [", ""])
def test_a_file_that_is_no_preset_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)

    with pytest.raises(BadConfig):
        load_config(path)


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_that_ships_loads(name: str) -> None:
    assert load_config(name).recipe in RECIPES


def test_the_plain_preset_is_the_defaults_spelled_out() -> None:
    written = yaml.safe_load(presets()["sft"].read_text())

    assert a_config().hyperparameters() == load_config("sft").hyperparameters()
    assert set(written) >= set(a_config().hyperparameters()) - {
        "recipe",
        "max_steps",
        "patience",
        "threads",
        "use_rslora",
        "weight_decay",
        "max_grad_norm",
    }


def test_every_knob_of_the_plain_preset_is_explained() -> None:
    lines = presets()["sft"].read_text().splitlines()
    explained = False
    for line in lines:
        if not line.strip():
            explained = False
        elif line.startswith("#"):
            explained = True
        else:
            assert explained, f"{line!r} follows no comment"


def test_every_setting_is_described() -> None:
    assert [name for name, field in SFTConfig.model_fields.items() if not field.description and name != "recipe"] == []


def test_alpha_is_twice_the_rank_unless_it_is_set() -> None:
    assert a_config(rank=4).resolved_alpha == 8
    assert a_config(rank=4, alpha=4).resolved_alpha == 4


def test_hyperparameters_hold_no_path() -> None:
    found = a_config(validation="/data/v.jsonl", init_from="/data/bundle").hyperparameters()

    assert not any("/" in str(value) for value in found.values())
    assert {"seed", "alpha", "learning_rate"} <= set(found)


def test_the_environment_is_set_before_the_process_starts() -> None:
    found = training_environment(3)

    assert found["OMP_NUM_THREADS"] == "3"
    assert found["MALLOC_TOP_PAD_"] == "67108864"
    assert found["HF_HUB_OFFLINE"] == "1"


def test_config_job_and_recipe_table_load_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "peft", "trl", "datasets", "vllm", "lm_eval")
    program = (
        "import sys, trainer.config, trainer.job, trainer.run, trainer.recipes, trainer.memory, trainer.export, "
        f"trainer.checkpoints; print([name for name in {heavy!r} if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)

    assert done.stdout.strip() == "[]"
