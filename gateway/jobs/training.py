"""What a fine-tuning job asks of the trainer: OpenAI's three hyperparameters, our own overrides, a shipped preset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field

from ..errors import Invalid
from ..registry.base_family import BaseFamily
from .models import FineTuningSpec

PRESETS = Path(__file__).resolve().parents[2] / "trainer" / "presets"
# The trainer's own, to which OpenAI's multiplier refers where a preset names none; a test compares the two.
DEFAULT_LEARNING_RATE = 1e-3

_MAX_MODULES = 256
_Module = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,120}$")]


class Hyperparameters(BaseModel, frozen=True, extra="forbid"):
    """OpenAI's three. `auto`, or left out: the preset's."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] = "auto"


class Overrides(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the trainer that a client may turn, by the trainer's names. Paths and names are not among them."""

    max_length: int | None = Field(default=None, ge=16, le=131_072)
    rank: int | None = Field(default=None, ge=1, le=512)
    alpha: float | None = Field(default=None, gt=0, le=4096)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    target_modules: Literal["all-linear"] | Annotated[tuple[_Module, ...], Field(max_length=_MAX_MODULES)] | None = None
    use_rslora: bool | None = None
    learning_rate: float | None = Field(default=None, gt=0, le=100)
    scheduler: Literal["linear", "cosine", "constant"] | None = None
    warmup: float | None = Field(default=None, ge=0, lt=1)
    epochs: float | None = Field(default=None, gt=0, le=50)
    max_steps: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1, le=256)
    gradient_accumulation: int | None = Field(default=None, ge=1, le=4096)
    weight_decay: float | None = Field(default=None, ge=0, le=1)
    max_grad_norm: float | None = Field(default=None, gt=0)
    checkpoint_every: int | None = Field(default=None, ge=1)
    patience: int | None = Field(default=None, ge=1)
    group_by_length: bool | None = None
    gradient_checkpointing: bool | None = None


_SAME_KNOB = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "learning_rate"}


def presets() -> dict[str, Path]:
    """The presets that ship, by name."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def check_request(
    hyperparameters: Hyperparameters, overrides: Overrides, *, preset: str | None, has_validation: bool, max_rank: int
) -> dict[str, Any]:
    """What the job's spec keeps of both. Raises `Invalid` where they contradict each other or the server."""
    asked = {name: value for name, value in hyperparameters.model_dump().items() if value != "auto"}
    own = overrides.model_dump(mode="json", exclude_none=True)
    for name in asked:
        if _SAME_KNOB[name] in own:
            text = f"{name} and x_turnout.overrides.{_SAME_KNOB[name]} set the same knob; give one of them"
            raise Invalid(text, code="twice_set", param=name)
    if preset is not None and preset not in presets():
        text = f"no preset is called {preset!r:.60}; there are: {', '.join(presets()) or 'none'}"
        raise Invalid(text, code="preset_not_found", param="x_turnout.preset")
    if own.get("rank", 0) > max_rank:
        text = (
            f"rank {own['rank']} is more than this server serves ({max_rank}); lower it, or raise engine.max_lora_rank"
        )
        raise Invalid(text, code="rank_too_high", param="x_turnout.overrides.rank")
    if "patience" in own and not has_validation:
        text = "patience needs a validation_file: without held-out rows nothing says when to stop"
        raise Invalid(text, code="no_validation_file", param="x_turnout.overrides.patience")
    return {**own, **asked}


def training_config(
    spec: FineTuningSpec, *, base: BaseFamily, files_dir: Path, init_from: Path | None, threads: int
) -> dict[str, Any]:
    """The trainer's config of a job: the preset, then what the client asked for, then what only the server decides."""
    values = _preset(spec.preset)
    values.update({name: value for name, value in spec.hyperparameters.items() if name not in _SAME_KNOB})
    values.update(_openai(spec.hyperparameters, float(values.get("learning_rate", DEFAULT_LEARNING_RATE))))
    if spec.validation_file is None:
        values.pop("patience", None)
    return {
        **values,
        "recipe": spec.recipe,
        "adapter": spec.adapter,
        "base_model": str(base.path),
        "base_model_name": base.name,
        "init_from": str(init_from) if init_from else None,
        "parent": spec.model if init_from else None,
        "dataset": str(files_dir / spec.training_file),
        "validation": str(files_dir / spec.validation_file) if spec.validation_file else None,
        "threads": threads,
        "seed": spec.seed,
    }


def _preset(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    found = yaml.safe_load(presets()[name].read_text())
    return dict(found)


def _openai(asked: Mapping[str, Any], learning_rate: float) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "n_epochs" in asked:
        values["epochs"] = asked["n_epochs"]
    if "batch_size" in asked:
        values["batch_size"] = asked["batch_size"]
    if "learning_rate_multiplier" in asked:
        values["learning_rate"] = learning_rate * asked["learning_rate_multiplier"]
    return values
