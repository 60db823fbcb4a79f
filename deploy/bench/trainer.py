"""How fast training is: our settings against TRL's defaults, on the same rows, in the same run.

    python -m deploy.bench.trainer

Writes build/bench/trainer.json. A figure is real tokens (padding not counted) per second of CPU time on one thread, from
the fifth step on: whatever else runs on the machine changes it little. "At equal loss": both sides train on the same rows
with the same step size, and the loss on held-out rows is compared. The defaults are those of `SFTTrainer(model=<path>)`:
fp32 weights, bf16 autocast, gradient checkpointing, sdpa, and an environment in which nothing was tuned.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.demo.data import DemoData, make_demo_data
from deploy.demo.report import Row, write_report

REPORT = Path("build/bench/trainer.json")
BASE = Path("build/models/smollm2-135m-instruct")
STEPS = 20
WARM_STEPS = 5
BATCH = 8
THREADS = 1
HELD_OUT_ROWS = 32
LEARNING_RATE = 1e-3
RANK = 16
IGNORED = -100
MIN_RATIO = 2.0
MAX_LOSS_GAP = 0.1


@dataclass(frozen=True)
class Side:
    """What one side reached."""

    tokens_per_cpu_s: float
    held_out_loss: float


def main() -> None:
    """Measure both sides, write the report, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, default=REPORT)
    parser.add_argument("--defaults", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # our own child
    arguments = parser.parse_args()
    if arguments.defaults is not None:
        print(json.dumps(vars(train_with_defaults(arguments.defaults))))  # noqa: T201
        return
    rows = measure()
    write_report(arguments.report, rows)
    for row in rows:
        print(f"{row.metric:36} {row.value:>10.4g} {row.unit:10} {row.target or ''}")  # noqa: T201


def measure() -> list[Row]:
    """Both sides, one after the other, so that neither disturbs the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cut_down(make_demo_data(folder, 0))
        ours, defaults = our_side(folder), their_side(folder)
    ratio = ours.tokens_per_cpu_s / defaults.tokens_per_cpu_s
    gap = ours.held_out_loss - defaults.held_out_loss
    return [
        Row("sft_tokens_per_cpu_s", round(ours.tokens_per_cpu_s, 1), "tokens/s", None, None),
        Row("sft_tokens_per_cpu_s_trl_defaults", round(defaults.tokens_per_cpu_s, 1), "tokens/s", None, None),
        Row("sft_ratio_defaults", round(ratio, 3), "ratio", f">= {MIN_RATIO:g}", ratio >= MIN_RATIO),
        Row("sft_held_out_loss", round(ours.held_out_loss, 4), "nats", None, None),
        Row("sft_held_out_loss_trl_defaults", round(defaults.held_out_loss, 4), "nats", None, None),
        Row("sft_loss_gap", round(gap, 4), "nats", f"<= {MAX_LOSS_GAP:g}", gap <= MAX_LOSS_GAP),
    ]


def cut_down(data: DemoData) -> None:
    """As many rows as the steps take, so that both sides see each once, in whatever order."""
    for path, count in ((data.train, STEPS * BATCH), (data.validation, HELD_OUT_ROWS)):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))


def our_side(folder: Path) -> Side:
    """The preset `sft`, by the trainer's own command."""
    settings = {
        "adapter": "bench", "dataset": folder / "train.jsonl", "validation": folder / "validation.jsonl", "rank": RANK,
        "batch_size": BATCH, "learning_rate": LEARNING_RATE, "warmup": 0, "checkpoint_every": STEPS, "base_model": BASE,
        "threads": THREADS,
    }  # fmt: skip
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    lines = _run(["-m", "trainer.run", "sft", *overrides, "--output", str(folder / "ours"), "--json"])
    points = [line["numbers"] for line in lines if "train_loss" in line.get("numbers", {})]
    first = next(point for point in points if point["step"] == WARM_STEPS)
    last = next(point for point in points if point["step"] == STEPS)
    held_out = next(line["numbers"]["valid_loss"] for line in lines if "valid_loss" in line.get("numbers", {}))
    return Side((last["tokens"] - first["tokens"]) / (last["cpu_s"] - first["cpu_s"]), held_out)


def their_side(folder: Path) -> Side:
    """A process of its own, in the environment as it is."""
    return Side(**_run(["-m", "deploy.bench.trainer", "--defaults", str(folder)])[-1])


def _run(arguments: list[str]) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(arguments)} ended with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def train_with_defaults(folder: Path) -> Side:
    """TRL as it comes, over rows that are encoded already: same tokens, same labels. Loads torch."""
    import datasets
    import torch
    import transformers
    from peft import LoraConfig
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    stamps: dict[int, tuple[float, int]] = {}

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stamps[state.global_step] = (time.process_time(), state.num_input_tokens_seen)

    trainer = SFTTrainer(
        model=str(BASE),
        args=SFTConfig(
            output_dir=str(folder / "theirs"), learning_rate=LEARNING_RATE, num_train_epochs=1, save_strategy="no",
            report_to="none", disable_tqdm=True, use_cpu=True, include_num_input_tokens_seen="non_padding", seed=0,
            dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_list(_encode(folder / "train.jsonl", tokenizer)),
        eval_dataset=datasets.Dataset.from_list(_encode(folder / "validation.jsonl", tokenizer)),
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=tokenizer,
        callbacks=[Stopwatch()],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    (begin, before), (end, after) = stamps[WARM_STEPS], stamps[STEPS]
    return Side((after - before) / (end - begin), float(trainer.evaluate()["eval_loss"]))


def _encode(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    rows = []
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(messages)["input_ids"]
        labels = [IGNORED] * len(prompt) + whole[len(prompt) : -1] + [IGNORED]  # not the line break after the end token
        rows.append({"input_ids": whole, "labels": labels})
    return rows


if __name__ == "__main__":
    main()
