"""What clients may ask of the trainer agrees with what the trainer takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.errors import Invalid
from gateway.jobs import training
from gateway.jobs.launch import environment
from gateway.jobs.models import FineTuningSpec
from gateway.jobs.training import DEFAULT_LEARNING_RATE, Hyperparameters, Overrides, check_request, training_config
from gateway.registry.base_family import BaseFamily
from gateway.settings import JobSettings, Settings
from tests.corpus import make_base
from trainer.config import SFTConfig
from trainer.environment import training_environment


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFamily:
    return make_base(tmp_path_factory.mktemp("bases") / "base")


def config_of(base: BaseFamily, *, init_from: Path | None = None, **fields: Any) -> dict[str, Any]:
    spec = FineTuningSpec(**({"model": "tiny", "adapter": "support", "training_file": "file-1"} | fields))
    return training_config(spec, base=base, files_dir=Path("/files"), init_from=init_from, threads=2)


def test_every_override_is_a_knob_of_the_trainer() -> None:
    assert set(Overrides.model_fields) <= set(SFTConfig.model_fields)
    assert not set(Overrides.model_fields) & {
        "adapter", "base_model", "base_model_name", "init_from", "parent", "dataset", "validation", "threads", "seed", "recipe",
    }  # fmt: skip


@pytest.mark.parametrize("name", Overrides.model_fields)
def test_what_an_override_allows_the_trainer_takes(base: BaseFamily, name: str) -> None:
    extremes: dict[str, list[Any]] = {
        "max_length": [16, 131_072], "rank": [1, 512], "alpha": [0.01, 4096], "dropout": [0, 0.99], "use_rslora": [True],
        "target_modules": ["all-linear", ("q_proj", "v_proj")], "learning_rate": [1e-9, 100], "warmup": [0, 0.99],
        "scheduler": ["linear", "cosine", "constant"], "epochs": [0.01, 50], "max_steps": [1], "batch_size": [1, 256],
        "gradient_accumulation": [1, 4096], "weight_decay": [0, 1], "max_grad_norm": [0.01], "checkpoint_every": [1],
        "patience": [1], "group_by_length": [False], "gradient_checkpointing": [True],
    }  # fmt: skip

    for value in extremes[name]:
        asked = Overrides.model_validate({name: value}).model_dump(mode="json", exclude_none=True)
        SFTConfig.model_validate(config_of(base, hyperparameters=asked, validation_file="file-2"))


def test_the_default_learning_rate_is_the_trainers() -> None:
    assert SFTConfig.model_fields["learning_rate"].default == DEFAULT_LEARNING_RATE


@pytest.mark.parametrize("preset", [None, *training.presets()])
def test_every_preset_becomes_a_config_that_the_trainer_takes(base: BaseFamily, preset: str | None) -> None:
    config = SFTConfig.model_validate(config_of(base, preset=preset))

    assert config.adapter == "support"
    assert config.base_model == base.path
    assert config.dataset == Path("/files/file-1")
    assert config.validation is None


def test_presets_ship() -> None:
    assert "sft" in training.presets()


def test_openais_words_become_the_trainers(base: BaseFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.yaml").write_text(
        "learning_rate: 0.0002\nepochs: 9\nrank: 4\npatience: 3\nadapter: x\ndataset: y\n"
    )
    monkeypatch.setattr(training, "PRESETS", tmp_path)
    asked = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5, "rank": 8}

    config = config_of(base, preset="slow", hyperparameters=asked, seed=7)

    assert {key: config[key] for key in ("epochs", "batch_size", "learning_rate", "rank", "seed", "adapter")} == {
        "epochs": 2,
        "batch_size": 4,
        "learning_rate": 0.0001,
        "rank": 8,
        "seed": 7,
        "adapter": "support",
    }
    assert "patience" not in config


def test_a_multiplier_alone_applies_to_the_trainers_rate(base: BaseFamily) -> None:
    config = config_of(base, hyperparameters={"learning_rate_multiplier": 3.0})

    assert config["learning_rate"] == pytest.approx(3 * DEFAULT_LEARNING_RATE)


def test_training_on_names_the_parent(base: BaseFamily) -> None:
    config = SFTConfig.model_validate(config_of(base, model="support@3", init_from=Path("/artifacts/x")))

    assert (config.parent, config.init_from) == ("support@3", Path("/artifacts/x"))


def test_the_same_knob_twice_is_refused() -> None:
    with pytest.raises(Invalid) as refused:
        check_request(
            Hyperparameters(batch_size=4), Overrides(batch_size=8), preset=None, has_validation=False, max_rank=16
        )
    assert (refused.value.code, refused.value.param) == ("twice_set", "batch_size")


def test_the_trainer_finds_its_environment_and_need_not_start_over(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, jobs=JobSettings(threads=2))

    given = environment(settings, tmp_path)

    assert training_environment(2).items() <= given.items()


@pytest.mark.invariant(11)
@pytest.mark.parametrize("name", ["base_model", "dataset", "validation", "init_from", "threads", "trust_remote_code"])
def test_paths_and_code_are_not_a_clients_to_name(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Overrides.model_validate({name: "/etc/passwd"})
