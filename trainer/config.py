"""Every knob of training, typed. Light: importing this loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from .errors import BadConfig

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,47}$"
VERSION_PATTERN = r"^[a-z0-9][a-z0-9-]{0,47}@[1-9][0-9]{0,8}$"
PRESETS = Path(__file__).parent / "presets"


class SFTConfig(BaseModel, frozen=True, extra="forbid"):
    """Supervised fine-tuning of a LoRA adapter on chat rows; the loss counts the assistant's tokens only."""

    recipe: Literal["sft"] = "sft"
    adapter: str = Field(pattern=NAME_PATTERN, description="name that the adapter will be published under")

    base_model: Path = Field(
        default=Path("build/models/smollm2-135m-instruct"), description="folder in Hugging Face format"
    )
    base_model_name: str = Field(
        default="smollm2-135m", pattern=NAME_PATTERN, description="name that requests use for the base model"
    )
    init_from: Path | None = Field(
        default=None, description="bundle to train on from; its rank, alpha and modules are taken over"
    )
    parent: str | None = Field(
        default=None, pattern=VERSION_PATTERN, description="version that `init_from` is, for the manifest"
    )

    dataset: Path = Field(description="chat JSONL to learn from")
    validation: Path | None = Field(default=None, description="chat JSONL to choose the best checkpoint by")
    max_length: int = Field(
        default=512, ge=16, description="rows with more tokens are left out, and reported by line number"
    )

    rank: int = Field(default=16, ge=1, le=512, description="rank of the adapter")
    alpha: float | None = Field(default=None, gt=0, description="scale of the adapter; unset: twice the rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of adapter inputs zeroed in training")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="linear layers that get an adapter"
    )
    use_rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) in place of alpha / rank")

    learning_rate: float = Field(default=1e-3, gt=0, le=100, description="peak step size")
    scheduler: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="how the step size falls after the warm-up"
    )
    warmup: float = Field(default=0.05, ge=0, lt=1, description="share of the steps in which the step size rises")
    epochs: float = Field(default=1.0, gt=0, le=1000, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="stop after so many steps, whatever the epochs")
    batch_size: int = Field(default=8, ge=1, le=4096, description="rows in one forward and backward pass")
    gradient_accumulation: int = Field(default=1, ge=1, le=4096, description="passes added up into one step")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="pull of the weights towards zero")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this length")

    checkpoint_every: int = Field(
        default=50, ge=1, description="steps between checkpoints and, with validation rows, between evaluations"
    )
    patience: int | None = Field(
        default=None, ge=1, description="evaluations without a better loss before training stops early"
    )

    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="arithmetic of the base model")
    attention: Literal["eager", "sdpa"] = Field(default="eager", description="implementation of attention")
    group_by_length: bool = Field(default=True, description="batch rows of like length, so that little is padding")
    gradient_checkpointing: bool = Field(default=False, description="compute activations twice to hold fewer of them")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; unset: all cores")
    seed: int = Field(default=0, ge=0, lt=2**32, description="same seed, data and threads: same adapter")

    @field_validator("target_modules")
    @classmethod
    def _in_order(cls, value: Literal["all-linear"] | tuple[str, ...]) -> Literal["all-linear"] | tuple[str, ...]:
        if isinstance(value, str):
            return value
        if not value or any(not name or name.rpartition(".")[2] == "lm_head" for name in value):
            raise ValueError("name at least one linear layer, and not lm_head: engines do not serve an adapter on it")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _make_sense(self) -> Self:
        if self.patience is not None and self.validation is None:
            raise ValueError("patience needs validation: without held-out rows nothing says when to stop")
        if self.parent is not None and self.init_from is None:
            raise ValueError("parent needs init_from: it names the version that is trained on")
        return self

    @property
    def resolved_alpha(self) -> float:
        """The scale that is used."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    def hyperparameters(self) -> dict[str, Any]:
        """Every knob but names and paths: what shapes the result, beside the data and the base model."""
        paths = {"adapter", "base_model", "base_model_name", "init_from", "parent", "dataset", "validation"}
        return {**self.model_dump(mode="json", exclude=paths), "alpha": self.resolved_alpha}


def presets() -> dict[str, Path]:
    """The presets that ship, by name."""
    return {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}


def load_config(preset: str | Path, overrides: Sequence[str] = ()) -> SFTConfig:
    """Read a preset (a file, or the name of one that ships) and apply `key=value` overrides.

    Raises `BadConfig` that names the key, the value and what is allowed.
    """
    path = _find(preset)
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise BadConfig(f"{path} must hold `key: value` lines, not a {type(found).__name__}")
    return parse_config({**found, **_parse(overrides)}, source=str(path))


def parse_config(values: Mapping[str, Any], *, source: str) -> SFTConfig:
    """Check the values of a config. Raises `BadConfig` that names each wrong one."""
    try:
        return SFTConfig.model_validate(values)
    except ValidationError as error:
        lines = "; ".join(_explain(dict(found)) for found in error.errors())
        first = ".".join(str(part) for part in error.errors()[0]["loc"]) or None
        raise BadConfig(f"{source}: {lines}", param=first) from error


def _find(preset: str | Path) -> Path:
    path = Path(preset)
    if path.is_file():
        return path
    shipped = presets()
    if str(preset) in shipped:
        return shipped[str(preset)]
    raise BadConfig(f"no preset {str(preset)!r}: give a file, or one of {', '.join(shipped)}")


def _parse(overrides: Sequence[str]) -> dict[str, Any]:
    values = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise BadConfig(f"override {override!r} is not key=value")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise BadConfig(f"override {override!r}: the value is not YAML: {error}", param=key.strip()) from error
    return values


def _explain(error: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{name} is no setting of the trainer; it knows {', '.join(SFTConfig.model_fields)}"
    if error["type"] == "missing":
        return f"{name} is missing: set it in the preset, or with --set {name}=..."
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: {said} (got {error['input']!r})" if name else said
