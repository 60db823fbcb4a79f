"""The recipe from rows to bundle, on a base that trains in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from deploy.demo.data import DemoData, make_demo_data
from gateway.registry.base_family import load_base_family
from gateway.registry.manifest import canonical_bytes, canonical_config, parse_manifest
from gateway.registry.preflight import preflight
from tests.tiny_base import make_tiny_base
from trainer.config import SFTConfig
from trainer.errors import BadAdapter, BadConfig, Diverged, DoesNotFit
from trainer.models import Places, Progress, Trained

# Warnings of the libraries are their business; ours are raised in every other test.
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("default")]

WEIGHTS = "adapter_model.safetensors"
Train = Callable[..., Trained]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    """The demo's data, cut down."""
    found = make_demo_data(tmp_path_factory.mktemp("data"), 0)
    for path in vars(found).values():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:32]))
    return found


@pytest.fixture
def heard() -> list[Progress]:
    return []


@pytest.fixture
def train(base: Path, data: DemoData, tmp_path: Path, heard: list[Progress]) -> Train:
    """Train with a few settings changed; each call in a folder of its own."""
    from trainer.recipes.sft import train as recipe

    def run(name: str = "one", **changes: Any) -> Trained:
        settings: dict[str, Any] = {
            "adapter": "support", "base_model": base, "base_model_name": "tiny", "dataset": data.train, "rank": 4,
            "batch_size": 4, "max_steps": 6, "checkpoint_every": 3, "threads": 1,
        }  # fmt: skip
        config = SFTConfig.model_validate({**settings, **changes})
        return recipe(config, Places(tmp_path / name, tmp_path / f"{name}.checkpoints"), heard.append)

    return run


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(train: Train) -> None:
    first, again, other = train("first", dropout=0.1), train("again", dropout=0.1), train("other", dropout=0.1, seed=1)

    assert first.digest == again.digest
    assert first.digest != other.digest


def test_a_bundle_holds_three_files_that_the_registry_takes(train: Train, base: Path, data: DemoData) -> None:
    trained = train(validation=data.validation)

    assert sorted(path.name for path in trained.bundle.iterdir()) == ["adapter_config.json", WEIGHTS, "manifest.json"]
    family = load_base_family("tiny", base)
    found = preflight(trained.bundle, family, max_rank=4)
    assert found.rank == 4
    content = (trained.bundle / "adapter_config.json").read_bytes()
    assert content == canonical_bytes(canonical_config(json.loads(content), base_model="tiny"))


def test_the_manifest_says_how_the_bundle_was_made(train: Train, base: Path, data: DemoData) -> None:
    trained = train(validation=data.validation)

    manifest = parse_manifest((trained.bundle / "manifest.json").read_bytes())
    family = load_base_family("tiny", base)
    assert (manifest.adapter, manifest.base_model, manifest.base_digest) == ("support", "tiny", family.digest)
    assert manifest.chat_template_digest == family.chat_template_digest
    assert [(record.role, record.rows) for record in manifest.datasets] == [("train", 32), ("validation", 32)]
    assert manifest.recipe["learning_rate"] == 1e-3
    assert manifest.recipe["alpha"] == 8
    assert {"torch", "peft", "trl", "transformers", "python"} <= set(manifest.versions)
    assert manifest.tokens == trained.tokens > 0
    assert manifest.peak_memory_bytes is not None
    assert manifest.peak_memory_bytes > 2**27
    assert manifest.metrics["best_valid_loss"] <= manifest.metrics["valid_loss"]
    assert str(trained.bundle.parent) not in (trained.bundle / "manifest.json").read_text()


def test_training_changes_the_adapter_and_lowers_the_loss(train: Train, heard: list[Progress]) -> None:
    trained = train(learning_rate=1e-2, max_steps=40, checkpoint_every=40)

    weights = load_file(trained.bundle / WEIGHTS)
    assert all(np.isfinite(value).all() for value in weights.values())
    assert any(np.abs(value).max() > 0 for name, value in weights.items() if "lora_B" in name)
    losses = [progress.numbers["train_loss"] for progress in heard if "train_loss" in progress.numbers]
    assert losses[-1] < losses[0]


def test_the_loss_is_trls_own_over_answer_tokens_only(base: Path, data: DemoData, tmp_path: Path) -> None:
    """Ours skips work on CPU that cannot change the result."""
    import torch
    from trl import SFTTrainer

    from trainer.data import load_chat_rows, load_tokenizer
    from trainer.model import add_adapter, load_base
    from trainer.recipes.sft import as_dataset, build_trainer

    config = SFTConfig(adapter="support", base_model=base, dataset=data.train, precision="fp32", batch_size=4)
    tokenizer = load_tokenizer(base)
    rows = load_chat_rows(data.train, tokenizer, max_length=512)
    trainer = build_trainer(config, add_adapter(load_base(config), config), tokenizer, rows, None, tmp_path, [])
    batch = trainer.data_collator([as_dataset(rows)[index] for index in range(4)])
    counted = (batch["labels"][:, 1:] != -100).sum()
    trainer.model.eval()

    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=counted)
        theirs = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=counted)

    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_training_stops_early_and_the_best_checkpoint_is_what_is_exported(
    train: Train, tmp_path: Path, heard: list[Progress]
) -> None:
    """Held-out answers that contradict the training rows: the longer it trains, the worse."""
    same, opposite = tmp_path / "same.jsonl", tmp_path / "opposite.jsonl"
    for path, word in ((same, " yes"), (opposite, " no")):
        row = {"messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "So:" + 20 * word}]}
        path.write_text(16 * (json.dumps(row) + "\n"))

    trained = train(
        dataset=same, validation=opposite, learning_rate=1e-2, max_steps=40, checkpoint_every=5, patience=2, warmup=0
    )

    told = {p.numbers["step"]: p.numbers["valid_loss"] for p in heard if "valid_loss" in p.numbers}
    best = min(told, key=lambda step: told[step])
    assert trained.steps == best + 10 < 40
    assert trained.metrics["best_step"] == best
    assert trained.metrics["best_valid_loss"] == told[best] < trained.metrics["valid_loss"]
    folders = {
        step: tmp_path / "one.checkpoints" / f"checkpoint-{step:.0f}" / WEIGHTS for step in (best, trained.steps)
    }
    assert same_tensors(trained.bundle / WEIGHTS, folders[best])
    assert not same_tensors(trained.bundle / WEIGHTS, folders[trained.steps])


def same_tensors(one: Path, other: Path) -> bool:
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_training_goes_on_from_a_bundle(train: Train, data: DemoData) -> None:
    first = train("first", learning_rate=1e-2, rank=8, alpha=8)

    second = train(
        "second", dataset=data.shuffled, init_from=first.bundle, parent="support@1", learning_rate=1e-9, max_steps=1
    )

    before, after = load_file(first.bundle / WEIGHTS), load_file(second.bundle / WEIGHTS)
    assert all(np.allclose(before[name], after[name], atol=1e-6) for name in before)
    manifest = parse_manifest((second.bundle / "manifest.json").read_bytes())
    assert (manifest.rank, manifest.alpha, manifest.parent) == (8, 8, "support@1")
    assert (manifest.recipe["rank"], manifest.recipe["alpha"]) == (8, 8)


def test_an_adapter_of_another_base_is_not_trained_on(train: Train, tmp_path: Path) -> None:
    first = train("first", target_modules=["q_proj"])
    config = json.loads((first.bundle / "adapter_config.json").read_text())
    (first.bundle / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["v_proj"]}))

    with pytest.raises(BadAdapter, match="does not fit the base model") as caught:
        train("second", init_from=first.bundle)

    assert caught.value.param == "init_from"


@pytest.mark.parametrize("content", [None, "{", '{"peft_type": "IA3"}'])
def test_a_folder_without_a_lora_adapter_is_not_trained_on(train: Train, tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    if content is not None:
        (folder / "adapter_config.json").write_text(content)

    with pytest.raises(BadAdapter, match="odd"):
        train(init_from=folder)


def test_modules_that_the_base_does_not_have_are_refused(train: Train) -> None:
    with pytest.raises(BadConfig, match=r"target_modules .*c_attn"):
        train(target_modules=["c_attn"])


def test_rows_left_out_are_told_by_line_and_counted_in_the_manifest(
    train: Train, heard: list[Progress], data: DemoData
) -> None:
    lengths = sorted(len(json.loads(line)["messages"][1]["content"]) for line in data.train.read_text().splitlines())

    trained = train(max_length=130)

    told = [progress.message for progress in heard if progress.level == "warn"]
    record = parse_manifest((trained.bundle / "manifest.json").read_bytes()).datasets[0]
    assert lengths[0] < lengths[-1]
    assert 0 < record.rows < 32
    assert any("training line " in message and "max_length 130" in message for message in told)
    assert heard[0].message.startswith(f"training: {record.rows} of 32 rows")


def test_it_is_refused_before_anything_large_is_loaded_when_memory_is_short(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.recipes import sft

    monkeypatch.setattr(sft, "available_bytes", lambda: 2**28)
    monkeypatch.setattr(sft, "load_base", lambda config: pytest.fail("the base was loaded"))

    with pytest.raises(DoesNotFit, match=r"0\.25 GiB are free"):
        train()


def test_a_torn_checkpoint_is_removed_and_not_resumed_from(train: Train, tmp_path: Path, heard: list[Progress]) -> None:
    from transformers.trainer_utils import get_last_checkpoint

    undisturbed = train("undisturbed")
    torn = tmp_path / "one.checkpoints" / "checkpoint-5"
    torn.mkdir(parents=True)
    assert get_last_checkpoint(str(torn.parent)) == str(torn)  # the library would take it

    trained = train("one")

    assert trained.digest == undisturbed.digest
    assert not torn.exists()
    assert any("removed checkpoint-5" in progress.message for progress in heard)


def test_another_trainings_checkpoint_is_not_resumed_from(train: Train, tmp_path: Path, heard: list[Progress]) -> None:
    expected = train("expected", learning_rate=5e-3)
    train("one")
    (tmp_path / "one").rename(tmp_path / "kept")

    trained = train("one", learning_rate=5e-3)

    assert trained.digest == expected.digest
    assert not any("going on from" in progress.message for progress in heard)


def test_a_loss_that_is_no_number_ends_training() -> None:
    from transformers import TrainerControl, TrainerState
    from trl import SFTConfig as TRLConfig

    from trainer.progress import Clock, ReportProgress

    callback = ReportProgress(lambda progress: None, Clock())

    with pytest.raises(Diverged, match=r"train_loss is nan at step 7: lower learning_rate"):
        callback.on_log(
            TRLConfig(output_dir="unused", use_cpu=True, bf16=False), TrainerState(global_step=7, max_steps=9), TrainerControl(),
            logs={"loss": float("nan")},
        )  # fmt: skip
