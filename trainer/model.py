"""The base model with an adapter on it. Heavy: loads torch, transformers and PEFT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from gateway.registry.manifest import CONFIG_FILE, WEIGHTS_FILE, canonical_config

from .config import SFTConfig
from .errors import BadAdapter, BadConfig, DoesNotFit


def choose_device() -> torch.device:
    """The accelerator when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(config: SFTConfig) -> PreTrainedModel:
    """The base model in the arithmetic of the config; code that ships with a model is never run."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        config.base_model, dtype=dtype, attn_implementation=config.attention, local_files_only=True
    )
    model.config.use_cache = False
    return model


def resolve_start(config: SFTConfig) -> SFTConfig:
    """The config with the shape of the adapter that training goes on from, if there is one."""
    if config.init_from is None:
        return config
    found = _read_config(config.init_from)
    targets = found["target_modules"]
    shape = {
        "rank": int(found["r"]),
        "alpha": float(found["lora_alpha"]),
        "target_modules": targets if isinstance(targets, str) else tuple(sorted(targets)),
        "use_rslora": bool(found.get("use_rslora")),
    }
    return config.model_copy(update=shape)


def add_adapter(model: PreTrainedModel, config: SFTConfig) -> PeftModel:
    """A fresh adapter, or the one that training goes on from."""
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    patterns = _patterns(config.init_from) if config.init_from else {}
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.resolved_alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        **patterns,
    )
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise BadConfig(f"target_modules {targets!r}: {error}", param="target_modules") from error
    if config.init_from is not None:
        _load_weights(adapted, config.init_from)
    return adapted


def _load_weights(adapted: PeftModel, bundle: Path) -> None:
    try:
        weights = load_file(bundle / WEIGHTS_FILE)
    except SafetensorError as error:
        raise BadAdapter(f"the weights in {bundle} cannot be read: {error}", param="init_from") from error
    try:
        outcome = set_peft_model_state_dict(adapted, weights)
    except RuntimeError as error:
        raise BadAdapter(f"the adapter in {bundle} does not fit the base model: {error}", param="init_from") from error
    missing = [key for key in outcome.missing_keys if "lora_" in key]
    if missing or outcome.unexpected_keys:
        odd = (missing + list(outcome.unexpected_keys))[0]
        raise BadAdapter(f"the adapter in {bundle} does not fit the base model: see tensor {odd}", param="init_from")


def _patterns(bundle: Path) -> dict[str, Any]:
    found = _read_config(bundle)
    return {name: found.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}


def _read_config(bundle: Path) -> dict[str, Any]:
    """In canonical form, which is the few fields that count: PEFT imports modules that a config names."""
    try:
        found = json.loads((bundle / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise BadAdapter(f"{bundle} holds no adapter to train on from: {error}", param="init_from") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise BadAdapter(f"{bundle / CONFIG_FILE} is not of a LoRA adapter", param="init_from")
    if not (bundle / WEIGHTS_FILE).is_file():
        raise BadAdapter(f"{bundle} has no {WEIGHTS_FILE}", param="init_from")
    return canonical_config(found)


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Where the estimate was too low after all: say so, and what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise DoesNotFit(
            "training ran out of memory: lower batch_size or max_length, or set gradient_checkpointing=true"
        ) from error
