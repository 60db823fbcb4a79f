"""Static checks of a bundle that nobody vouches for, before anything loads it. Nothing in it is executed or unpickled.

Two kinds of fault show only when the adapter runs and are left to the verify job: damaged values of ordinary size
(bit flips), and weights made for another base of the same shape when the bundle names none.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from ..errors import Refused
from .base_family import BaseFamily, chat_template_digest, is_other_model, tokenizer_digest
from .manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MAX_STRUCTURE,
    WEIGHTS_FILE,
    Manifest,
    bundle_digest,
    canonical_bytes,
    canonical_config,
    parse_manifest,
    parse_object,
)
from .models import DIGEST_PATTERN
from .reasons import REASONS, refusal
from .source import (
    MAX_TOKENIZER_BYTES,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    open_regular,
    opened,
    read_optional,
    read_text,
    refuse_pickles,
    sha256,
)
from .tensors import TensorInfo, read_float32, read_header

MAX_ABSOLUTE = 1e3
"""Largest weight accepted. Adam moves a weight by at most about its rate per step, so even 10,000 steps at 1e-2 end at
100; float16 ends at 65,504, and larger weights overflow in the products of a forward pass and poison the key-value cache."""
MAX_SCALING = 1e3
"""Largest lora_alpha / r accepted, for the same reason; in use are 0.5 to 64."""

# Fields that turn the adapter into something that engines do not compute, with the code that each is refused with.
_FORBIDDEN = {
    "use_dora": "dora", "modules_to_save": "modules_to_save", "trainable_token_indices": "trainable_tokens",
    "lora_bias": "lora_bias", "alora_invocation_tokens": "alora", "use_qalora": "qalora", "use_bdlora": "bdlora",
    "layer_replication": "layer_replication", "target_parameters": "target_parameters", "kasa_config": "lora_variant",
    "monteclora_config": "lora_variant", "arrow_config": "lora_variant",
}  # fmt: skip
# Fields that change training only, or that the tensors themselves decide. They are dropped.
_INERT = frozenset({
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config",
})  # fmt: skip
_READ = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "init_lora_weights", "lora_alpha", "peft_type", "r",
    "rank_pattern", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
_EXCEPTIONS = ("layers_to_transform", "layers_pattern", "exclude_modules")
_HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})  # they only choose where training starts
_LORA_TENSOR = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]{1,200})\.lora_(?P<side>[AB])\.weight")
_PLAIN_NAME = re.compile(r"\^?[A-Za-z0-9_.-]{1,200}")
_DTYPES = ("F32", "F16", "BF16")


class Preflighted(BaseModel, frozen=True):
    """A bundle that passed, and all that publishing needs to know of it."""

    config: dict[str, Any] = Field(description="canonical adapter_config.json")
    digest: str = Field(pattern=DIGEST_PATTERN)
    weights_digest: str = Field(pattern=DIGEST_PATTERN, description="sha256 of adapter_model.safetensors")
    size_bytes: int = Field(description="of adapter_model.safetensors")
    rank: int = Field(description="highest of any layer")
    alpha: float
    target_modules: tuple[str, ...]
    manifest: Manifest | None = Field(description="as it came; None for a plain PEFT folder")

    @property
    def config_bytes(self) -> bytes:
        """The `adapter_config.json` to publish."""
        return canonical_bytes(self.config)


def preflight(directory: Path, base: BaseFamily, *, max_rank: int, max_weights_bytes: int = 2 * 2**30) -> Preflighted:
    """Check a bundle, or a plain PEFT folder, against the base it shall run on.

    Raises `Refused` with a code of `REASONS` and a message that names the thing, the value and the remedy.
    """
    with opened(directory) as folder:
        refuse_pickles(folder)
        content = read_text(folder, CONFIG_FILE, missing="missing_config")
        config = parse_object(content, CONFIG_FILE, code="bad_config", max_structure=MAX_STRUCTURE)
        manifest_content = read_optional(folder, MANIFEST_FILE)
        manifest = parse_manifest(manifest_content) if manifest_content is not None else None
        _check_base(config, manifest, base)
        _check_tokenizer(folder, manifest, base)
        _check_features(config)
        _check_numbers(config, max_rank=max_rank)
        descriptor = open_regular(folder, WEIGHTS_FILE, missing="missing_weights", max_bytes=max_weights_bytes)
        try:
            modules = _pair(read_header(descriptor), base)
            _check_targets(config, modules, base)
            canonical, rank = _resolve(config, modules, base)
            _check_values(descriptor, modules)
            weights_digest = sha256(descriptor)
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    if manifest is not None:
        found = {CONFIG_FILE: hashlib.sha256(content).hexdigest(), WEIGHTS_FILE: weights_digest}
        _check_recorded(manifest, found)
    return Preflighted(
        config=canonical, digest=bundle_digest(canonical_bytes(canonical), weights_digest), weights_digest=weights_digest,
        size_bytes=size, rank=rank, alpha=canonical["lora_alpha"], target_modules=tuple(canonical["target_modules"]), manifest=manifest,
    )  # fmt: skip


def _check_recorded(manifest: Manifest, found: dict[str, str]) -> None:
    for name, digest in found.items():
        recorded = manifest.files.get(name, digest)
        if recorded != digest:
            raise Refused(
                f"{name} has sha256 {digest[:12]}…, its manifest recorded {recorded[:12]}…; copy or upload the bundle again",
                code="digest_mismatch", param=name,
            )  # fmt: skip


# ---- What it was made for ------------------------------------------------------------------------------------------


def _check_base(config: dict[str, Any], manifest: Manifest | None, base: BaseFamily) -> None:
    if manifest is not None and manifest.base_digest is not None:
        if manifest.base_digest != base.digest:
            raise Refused(
                f"the manifest names base {manifest.base_model[:80]!r} with digest {manifest.base_digest[:12]}…, this server runs "
                f"{base.name!r} with {base.digest[:12]}…; train on this server's base model",
                code="wrong_base", param="base_digest",
            )  # fmt: skip
        return
    for declared in (config.get("base_model_name_or_path"), manifest.base_model if manifest else None):
        if declared is not None and not isinstance(declared, str):
            raise _bad_config("base_model_name_or_path", declared, "a name or null")
        if declared and is_other_model(declared, base):
            raise Refused(
                f"the adapter was made for {declared[:80]!r}, this server runs {base.name!r}; train on this server's base model",
                code="wrong_base", param="base_model_name_or_path",
            )  # fmt: skip


def _check_tokenizer(folder: int, manifest: Manifest | None, base: BaseFamily) -> None:
    tokenizers, templates = set(), set()
    if manifest is not None:
        tokenizers.add(manifest.tokenizer_digest)
        templates.add(manifest.chat_template_digest)
    if (saved := read_optional(folder, TOKENIZER_FILE, max_bytes=MAX_TOKENIZER_BYTES)) is not None:
        tokenizers.add(tokenizer_digest(saved))
    if (saved := read_optional(folder, TEMPLATE_FILE)) is not None:
        templates.add(chat_template_digest(saved))
    for digests, expected, code in (
        (tokenizers, base.tokenizer_digest, "wrong_tokenizer"),
        (templates, base.chat_template_digest, "wrong_chat_template"),
    ):
        other = digests - {None, expected}
        if other:
            raise Refused(
                f"{REASONS[code]} (digest {min(map(str, other))[:12]}…, the base model's is {expected[:12]}…)",
                code=code,
            )


# ---- adapter_config.json -------------------------------------------------------------------------------------------


def _check_features(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise refusal("peft_type", f"peft_type is {str(config.get('peft_type'))[:40]!r}")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise refusal("task_type", f"task_type is {str(config['task_type'])[:40]!r}")
    for field, code in _FORBIDDEN.items():
        if config.get(field):
            raise refusal(code, f"{field} is {str(config[field])[:60]}", param=field)
    if config.get("bias", "none") != "none":
        raise refusal("bias", f"bias is {str(config['bias'])[:40]!r}")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool | None) and str(init).lower() not in _HARMLESS_INITS:
        raise refusal("base_changing_init", f"init_lora_weights is {str(init)[:40]!r}", param="init_lora_weights")
    for field in sorted(set(config) - set(_FORBIDDEN) - _INERT - _READ):
        if config[field]:
            raise refusal("unknown_field", f"{field[:60]!r} is {str(config[field])[:60]}", param=field[:60])


def _check_numbers(config: dict[str, Any], *, max_rank: int) -> None:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    if not isinstance(ranks, dict) or not isinstance(alphas, dict):
        raise _bad_config("rank_pattern", ranks, "a map from layer names to numbers")
    for key in (*ranks, *alphas):
        if not _PLAIN_NAME.fullmatch(key):
            raise refusal("bad_pattern", f"{key[:80]!r} is not a layer's name", param="rank_pattern")
    for value in (rank, *ranks.values()):
        if type(value) is not int or value < 1:
            raise _bad_config("r", value, "a whole number of at least 1")
        if value > max_rank:
            raise Refused(
                f"rank {value} is above {max_rank}, the highest served; train with a lower rank or raise engine.max_lora_rank",
                code="rank_too_high", param="r",
            )  # fmt: skip
    for value in (alpha, *alphas.values()):
        if type(value) not in (int, float) or not _is_finite(value):
            raise _bad_config("lora_alpha", value, "a number")
    if not isinstance(config.get("use_rslora") or False, bool):
        raise _bad_config("use_rslora", config["use_rslora"], "true or false")


def _check_targets(config: dict[str, Any], modules: dict[str, _Pair], base: BaseFamily) -> None:
    """The tensors are those of the layers that the config lists: none was lost, none would be left out by PEFT.

    A regular expression or `all-linear` is not evaluated (an uploaded expression can take for ever), nor are exceptions to the list.
    """
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise _bad_config("target_modules", targets, "a list of layers' names")
    names = set(targets)
    listed = {module for module in base.module_shapes if not names.isdisjoint(_suffixes(module))}
    has_exceptions = any(config.get(field) is not None for field in _EXCEPTIONS)
    astray = sorted(modules.keys() - listed) + ([] if has_exceptions else sorted(listed - modules.keys()))
    if astray:
        what = f"{astray[0]} is in only one of target_modules and the weights ({len(astray)} such layers)"
        raise refusal("target_mismatch", what, param="target_modules")


def _resolve(config: dict[str, Any], modules: dict[str, _Pair], base: BaseFamily) -> tuple[dict[str, Any], int]:
    """The canonical config of these tensors, and the highest rank; every layer's rank and scaling checked on the way."""
    rank, alpha = config["r"], config["lora_alpha"]
    ranks = _by_module(config.get("rank_pattern") or {}, modules)
    alphas = _by_module(config.get("alpha_pattern") or {}, modules)
    effect = False
    for module, pair in modules.items():
        expected, own_alpha = ranks.get(module, rank), alphas.get(module, alpha)
        if pair.rank != expected:
            raise Refused(
                f"{module}: its tensors have rank {pair.rank}, the config says {expected}; publish the config saved with them",
                code="rank_mismatch", param=module,
            )  # fmt: skip
        scaling = own_alpha / (math.sqrt(expected) if config.get("use_rslora") else expected)
        if abs(scaling) > MAX_SCALING:
            raise Refused(
                f"{module}: scaling {scaling:.3g} is above {MAX_SCALING:g}; {REASONS['magnitude']}",
                code="magnitude",
                param=module,
            )
        effect = effect or scaling != 0
    if not effect:
        raise refusal("no_effect", "lora_alpha is 0", param="lora_alpha")
    resolved = {
        **config,
        "target_modules": _targets(modules, base),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
    }
    return canonical_config(resolved, base_model=base.name), max(pair.rank for pair in modules.values())


def _by_module(pattern: dict[str, Any], modules: dict[str, _Pair]) -> dict[str, Any]:
    """Which layers a pattern of plain names sets. As in PEFT, a key matches at a dot and the first that matches wins."""
    order = {key: index for index, key in enumerate(pattern)}
    found = {}
    for module in modules:
        matching = [name for name in ("^" + module, *_suffixes(module)) if name in order]
        if matching:
            found[module] = pattern[min(matching, key=order.__getitem__)]
    return found


def _suffixes(module: str) -> list[str]:
    """`a.b.c` as a.b.c, b.c, c."""
    parts = module.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


def _targets(modules: dict[str, _Pair], base: BaseFamily) -> list[str]:
    """The layers by their last name where the adapter covers all of that name, else by their full path."""
    everywhere: dict[str, set[str]] = {}
    for module in base.module_shapes:
        everywhere.setdefault(module.rpartition(".")[2], set()).add(module)
    names = {module.rpartition(".")[2] for module in modules}
    whole = {name for name in names if everywhere[name] <= modules.keys()}
    return sorted(whole | {module for module in modules if module.rpartition(".")[2] not in whole})


# ---- adapter_model.safetensors -------------------------------------------------------------------------------------


class _Pair(BaseModel, frozen=True, arbitrary_types_allowed=True):
    """The two factors of one layer's change."""

    a: TensorInfo
    b: TensorInfo

    @property
    def rank(self) -> int:
        return self.a.shape[0]


def _pair(tensors: tuple[TensorInfo, ...], base: BaseFamily) -> dict[str, _Pair]:
    if not tensors:
        raise refusal("bad_safetensors", "the file holds no tensor", param=WEIGHTS_FILE)
    sides: dict[str, dict[str, TensorInfo]] = {}
    for tensor in tensors:
        module, side = _parse_name(tensor.name, base)
        if tensor.dtype not in _DTYPES:
            raise refusal("dtype", f"{tensor.name[:160]} is {tensor.dtype}", param=module)
        sides.setdefault(module, {})[side] = tensor
    for module, pair in sorted(sides.items()):
        if len(pair) != 2:
            raise refusal("unpaired", f"{module} has only lora_{min(pair)}", param=module)
        _check_shapes(module, pair["A"], pair["B"], base.module_shapes[module])
    return {module: _Pair(a=pair["A"], b=pair["B"]) for module, pair in sorted(sides.items())}


def _parse_name(name: str, base: BaseFamily) -> tuple[str, str]:
    for part, code in (
        ("lora_magnitude_vector", "dora"), ("lora_B.bias", "lora_bias"), ("modules_to_save", "modules_to_save"),
        ("trainable_tokens", "trainable_tokens"), ("lora_embedding_", "embeddings"), ("embed_tokens", "embeddings"),
        ("lm_head", "embeddings"),
    ):  # fmt: skip
        if part in name:
            raise refusal(code, f"the weights hold {name[:160]!r}", param=name[:160])
    found = _LORA_TENSOR.fullmatch(name)
    if found is None:
        raise refusal("unknown_tensor", f"the weights hold {name[:160]!r}", param=name[:160])
    module = found["module"]
    if module in base.module_shapes:
        return module, found["side"]
    code = "unknown_layer" if re.sub(r"\.\d+\.", ".0.", module) in base.module_shapes else "unknown_module"
    raise refusal(code, f"{base.name!r} has no layer {module!r}", param=module)


def _check_shapes(module: str, a: TensorInfo, b: TensorInfo, shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    rank = a.shape[0] if a.shape else 0
    if a.shape != (rank, inputs) or b.shape != (outputs, rank) or rank < 1:
        raise Refused(
            f"{module}: lora_A is {list(a.shape)} and lora_B is {list(b.shape)}, the layer needs [rank, {inputs}] and "
            f"[{outputs}, rank]; train on this server's base model",
            code="rank_mismatch" if a.shape[1:] == (inputs,) and b.shape[:1] == (outputs,) and len(b.shape) == 2 else "wrong_shape",
            param=module,
        )  # fmt: skip


def _check_values(descriptor: int, modules: dict[str, _Pair]) -> None:
    """Every number, one tensor in memory at a time."""
    effect = False
    for pair in modules.values():
        largest = [_largest(descriptor, tensor) for tensor in (pair.a, pair.b)]
        effect = effect or min(largest) > 0
    if not effect:
        raise refusal("no_effect", "in every layer lora_A or lora_B is all zero", param=WEIGHTS_FILE)


def _largest(descriptor: int, tensor: TensorInfo) -> float:
    values = read_float32(descriptor, tensor)
    largest = float(np.abs(values).max())  # NaN if any is
    if not math.isfinite(largest):
        raise refusal("non_finite", f"{tensor.name} holds NaN or infinity", param=tensor.name)
    if largest > MAX_ABSOLUTE:
        raise Refused(
            f"{tensor.name} holds {largest:.3g}, above {MAX_ABSOLUTE:g}; {REASONS['magnitude']}",
            code="magnitude",
            param=tensor.name,
        )
    return largest


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _bad_config(field: str, value: object, allowed: str) -> Refused:
    return Refused(f"{CONFIG_FILE}: {field} must be {allowed}, got {str(value)[:60]!r}", code="bad_config", param=field)
