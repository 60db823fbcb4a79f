"""Supervised fine-tuning: learn to answer as the rows do. Heavy: loads torch, transformers, PEFT and TRL."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import PeftModel
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig as TRLConfig
from trl import SFTTrainer

from gateway.registry.base_family import BaseFamily, load_base_family
from gateway.registry.manifest import DatasetRecord

from ..checkpoints import Checkpoint, last_complete, remove_incomplete
from ..config import SFTConfig
from ..data import IGNORED, ChatRows, load_chat_rows, load_tokenizer
from ..environment import available_cores
from ..export import export_bundle, file_sha256
from ..memory import available_bytes, estimate, read_shape, require_memory
from ..model import add_adapter, choose_device, load_base, out_of_memory_explained, resolve_start
from ..models import OnProgress, Places, Progress, Trained
from ..progress import Clock, MarkCheckpoints, ReportProgress

_LOG_EVERY = 5
_SHOWN_LINES = 10


def train(config: SFTConfig, places: Places, on_progress: OnProgress) -> Trained:
    """Fine-tune with supervised examples; leave the adapter's bundle."""
    quieten_libraries()
    config = resolve_start(config)
    torch.set_num_threads(config.threads or available_cores())
    base = load_base_family(config.base_model_name, config.base_model)
    tokenizer = load_tokenizer(config.base_model)
    rows = load_chat_rows(config.dataset, tokenizer, max_length=config.max_length)
    held_out = load_chat_rows(config.validation, tokenizer, max_length=config.max_length) if config.validation else None
    tell_rows(rows, held_out, on_progress)
    check_memory(config, rows, held_out, on_progress)
    fingerprint = training_fingerprint(config, base, rows, held_out)
    checkpoint = find_checkpoint(places.checkpoints, fingerprint, on_progress)
    clock = Clock(checkpoint.elapsed_s if checkpoint else 0.0)
    set_seed(config.seed)
    model = add_adapter(load_base(config), config)
    callbacks = [ReportProgress(on_progress, clock), MarkCheckpoints(fingerprint, clock)]
    trainer = build_trainer(config, model, tokenizer, rows, held_out, places.checkpoints, callbacks)
    on_progress(Progress(f"training {trainable(model):,} weights for {planned_steps(config, rows)} steps"))
    with out_of_memory_explained():
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    metrics = final_metrics(trainer)
    final = places.checkpoints / "final"
    model.save_pretrained(final, save_embedding_layers=False)
    digest = export_bundle(
        final, places.bundle, config, base,
        datasets=dataset_records(rows, held_out), device=device_name(), metrics=metrics, wall_s=clock.elapsed_s(),
        tokens=trainer.state.num_input_tokens_seen, peak_memory_bytes=peak_memory_bytes(),
    )  # fmt: skip
    on_progress(Progress(f"bundle {digest[:12]} written after {clock.elapsed_s():.0f} s"))
    return Trained(places.bundle, digest, trainer.state.global_step, trainer.state.num_input_tokens_seen, metrics)


class ResumableOrder(LengthGroupedSampler):
    """Rows of like length together, in an order that a resumed run finds again.

    The library draws each epoch's order from torch's global state, which a run that goes on in a later epoch no longer
    has. Here the first epoch follows the seeded global state, and each later one a generator of its own.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self._seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch, and before the first one of a resumed run."""
        self.generator = torch.Generator().manual_seed(self._seed + epoch) if epoch else None


class AnswerTrainer(SFTTrainer):
    """TRL's trainer; on CPU it asks the model for the scores of answer positions only.

    TRL 1.16 does so on GPU alone: on CPU it projects every prompt token on the vocabulary too, forth and back in fp32.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(row) for row in (train_dataset or self.train_dataset)["input_ids"]]
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ResumableOrder(batch, lengths, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy of the answers' tokens."""
        if self.args.device.type != "cpu" or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        following = inputs["labels"][:, 1:]
        positions = (following != IGNORED).any(0).nonzero().squeeze(1)
        labels = following[:, positions]
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            logits_to_keep=positions, use_cache=False,
        ).logits  # fmt: skip
        scores, targets = logits.flatten(0, 1).float(), labels.flatten()
        total = torch.nn.functional.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum")
        counted = (targets != IGNORED).sum()
        hits = (scores.detach().argmax(-1) == targets).sum() / counted
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["mean_token_accuracy"].append(float(hits))
        return total / (counted if num_items_in_batch is None else num_items_in_batch)


def build_trainer(
    config: SFTConfig,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: ChatRows,
    held_out: ChatRows | None,
    checkpoints: Path,
    callbacks: list[TrainerCallback],
) -> AnswerTrainer:
    """TRL's trainer over rows that are encoded already, so that it changes none of them."""
    on_cpu = choose_device().type == "cpu"
    arguments = TRLConfig(
        output_dir=str(checkpoints),
        seed=config.seed,
        data_seed=config.seed,
        use_cpu=on_cpu,
        bf16=config.precision == "bf16",
        optim="adamw_torch" if on_cpu else "adamw_torch_fused",
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=not on_cpu,
        include_num_input_tokens_seen="non_padding",
        logging_steps=_LOG_EVERY,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        eval_strategy="steps" if held_out else "no",
        eval_steps=config.checkpoint_every,
        load_best_model_at_end=held_out is not None,
        metric_for_best_model="eval_loss" if held_out else None,
        greater_is_better=False if held_out else None,
        restore_callback_states_from_checkpoint=True,
    )
    if config.patience is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(early_stopping_patience=config.patience)]
    trainer = AnswerTrainer(
        model=model,
        args=arguments,
        train_dataset=as_dataset(rows),
        eval_dataset=as_dataset(held_out) if held_out else None,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def as_dataset(rows: ChatRows) -> datasets.Dataset:
    """The rows as the trainer takes them."""
    return datasets.Dataset.from_dict(
        {"input_ids": [row.input_ids for row in rows.rows], "labels": [row.labels for row in rows.rows]}
    )


def quieten_libraries() -> None:
    """Their bars and notes do not mix with our progress; what goes wrong is still raised."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def tell_rows(rows: ChatRows, held_out: ChatRows | None, on_progress: OnProgress) -> None:
    """Count what came in against what is used; name each line that is left out."""
    for role, found in (("training", rows), ("validation", held_out)):
        if found is None:
            continue
        on_progress(Progress(f"{role}: {len(found.rows)} of {found.read} rows, longest {found.longest} tokens"))
        for dropped in found.dropped[:_SHOWN_LINES]:
            on_progress(Progress(f"{role} line {dropped.line} left out: {dropped.reason}", level="warn"))
        if len(found.dropped) > _SHOWN_LINES:
            lines = ", ".join(str(dropped.line) for dropped in found.dropped[_SHOWN_LINES:])
            on_progress(Progress(f"{role} lines left out too: {lines}", level="warn"))


def check_memory(config: SFTConfig, rows: ChatRows, held_out: ChatRows | None, on_progress: OnProgress) -> None:
    """Refuse before anything large is loaded."""
    longest = max(rows.longest, held_out.longest if held_out else 0)
    shape = read_shape(config.base_model, precision_bytes=2 if config.precision == "bf16" else 4)
    needed = estimate(config, shape, longest=longest)
    free = available_bytes() if choose_device().type == "cpu" else torch.cuda.mem_get_info()[0]
    require_memory(needed, free)
    on_progress(Progress(f"memory: about {needed.arithmetic()}, {free / 2**30:.1f} GiB free"))


def training_fingerprint(config: SFTConfig, base: BaseFamily, rows: ChatRows, held_out: ChatRows | None) -> str:
    """Two trainings with one fingerprint are the same training: only then may one go on from the other's checkpoint."""
    knobs = config.hyperparameters()
    knobs.pop("threads")
    parts = {
        "knobs": knobs,
        "base": base.digest,
        "train": rows.digest,
        "validation": held_out.digest if held_out else None,
        "init_from": file_sha256(config.init_from / "adapter_model.safetensors") if config.init_from else None,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def find_checkpoint(directory: Path, fingerprint: str, on_progress: OnProgress) -> Checkpoint | None:
    """The newest whole checkpoint; what is torn, or of another training, is removed."""
    directory.mkdir(parents=True, exist_ok=True)
    gone = remove_incomplete(directory, fingerprint=fingerprint)
    if gone:
        on_progress(Progress(f"removed {', '.join(gone)}: torn, or of another training", level="warn"))
    found = last_complete(directory, fingerprint=fingerprint)
    if found is not None:
        on_progress(Progress(f"going on from step {found.step}"))
    return found


def planned_steps(config: SFTConfig, rows: ChatRows) -> int:
    """Steps of a run that is not stopped early."""
    if config.max_steps is not None:
        return config.max_steps
    batches = -(-len(rows.rows) // config.batch_size)
    return int(-(-config.epochs * max(1, -(-batches // config.gradient_accumulation)) // 1))


def trainable(model: PeftModel) -> int:
    """How many weights the adapter has."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def final_metrics(trainer: AnswerTrainer) -> dict[str, float]:
    """Last training loss, and the best and last validation loss."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    metrics = {"steps": float(trainer.state.global_step)}
    if losses:
        metrics["train_loss"] = float(losses[-1])
    if held_out:
        metrics["valid_loss"] = float(held_out[-1])
        metrics["best_valid_loss"] = float(min(held_out))
        metrics["best_step"] = float(trainer.state.best_global_step or trainer.state.global_step)
    return metrics


def dataset_records(rows: ChatRows, held_out: ChatRows | None) -> tuple[DatasetRecord, ...]:
    """For the manifest: which files, and how much of them was used."""
    found = (("train", rows), ("validation", held_out))
    return tuple(
        DatasetRecord(role=role, digest=one.digest, rows=len(one.rows), rows_left_out=len(one.dropped))
        for role, one in found
        if one is not None
    )


def device_name() -> str:
    """What it ran on."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def peak_memory_bytes() -> int:
    """Of the device that trained; on CPU of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
