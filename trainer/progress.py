"""What the training loop tells, and the marker that makes a checkpoint count. Heavy: loads transformers."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import mark_complete
from .errors import Diverged
from .models import OnProgress, Progress


class Clock:
    """Seconds of training, earlier attempts included."""

    def __init__(self, before_s: float = 0.0) -> None:
        self._start = time.monotonic() - before_s

    def elapsed_s(self) -> float:
        """So far."""
        return time.monotonic() - self._start


class ReportProgress(TrainerCallback):
    """Pass each logged step and each evaluation on; stop when the loss is no longer a number."""

    def __init__(self, on_progress: OnProgress, clock: Clock) -> None:
        self._say = on_progress
        self._clock = clock

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
        logs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Tell a step's or an evaluation's figures."""
        logs = logs or {}
        for key, name in (("loss", "train_loss"), ("eval_loss", "valid_loss")):
            if key in logs:
                self._tell(name, float(logs[key]), logs, state)

    def _tell(self, name: str, loss: float, logs: dict[str, Any], state: TrainerState) -> None:
        if not math.isfinite(loss):
            raise Diverged(f"{name} is {loss} at step {state.global_step}: lower learning_rate, and look at the data")
        prefix = "eval_" if name == "valid_loss" else ""
        accuracy = logs.get(f"{prefix}mean_token_accuracy")
        numbers = {"step": float(state.global_step), "total_steps": float(state.max_steps), name: loss}
        if accuracy is not None:
            numbers[name.replace("loss", "mean_token_accuracy")] = float(accuracy)
        if "learning_rate" in logs:
            numbers["learning_rate"] = float(logs["learning_rate"])
        numbers["tokens"] = float(state.num_input_tokens_seen)
        numbers["elapsed_s"] = round(self._clock.elapsed_s(), 2)
        numbers["cpu_s"] = round(time.process_time(), 2)
        words = "validation loss" if prefix else "loss"
        self._say(Progress(f"step {state.global_step} of {state.max_steps}: {words} {loss:.4f}", numbers=numbers))


class MarkCheckpoints(TrainerCallback):
    """Make each checkpoint count once all of it is on disk."""

    def __init__(self, fingerprint: str, clock: Clock) -> None:
        self._fingerprint = fingerprint
        self._clock = clock

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called when the library has written its files."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        mark_complete(folder, fingerprint=self._fingerprint, elapsed_s=self._clock.elapsed_s())
