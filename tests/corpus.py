"""Adapters to test with: good ones, and one of every bad kind that is known. Only numpy; no torch.

`make_adapter` writes a plain PEFT folder with random weights: sane enough to pass verification, different enough that
greedy answers differ by seed. `BAD` has a builder for each way in which an adapter can be wrong.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gateway.registry.base_family import BaseFamily, load_base_family

Tensors = dict[str, tuple[str, NDArray[Any]]]  # name -> (dtype of the file, values)
_NUMPY = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I32": "<i4"}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


# ---- Writing -------------------------------------------------------------------------------------------------------


def encode(dtype: str, values: NDArray[Any]) -> bytes:
    """The bytes of a tensor; BF16 rounded to nearest even."""
    if dtype != "BF16":
        return values.astype(_NUMPY[dtype]).tobytes()
    bits = values.astype("<f4").view("<u4")
    rounded: NDArray[Any] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.astype("<u2").tobytes()


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """A well-formed file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, values) in tensors.items():
        content = encode(dtype, values)
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(body), len(body) + len(content)],
        }
        body += content
    write_raw(path, json.dumps(header).encode(), body)


def write_raw(path: Path, header: bytes, body: bytes = b"") -> None:
    """A file with any header, true or not."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def make_base(directory: Path, *, seed: int = 0, name: str = "tiny", layers: int = 2, hidden: int = 32) -> BaseFamily:
    """A Llama of a few kilobytes in Hugging Face format."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(seed)
    words = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(61))]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4,
        "vocab_size": len(words), "tie_word_embeddings": True, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
    }  # fmt: skip
    tokenizer: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "post_processor": None,
        "decoder": None, "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {word: index for index, word in enumerate(words)}, "unk_token": "<unk>"},
    }  # fmt: skip
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 2, hidden), "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (2 * hidden, hidden), "mlp.up_proj": (2 * hidden, hidden),
        "mlp.down_proj": (hidden, 2 * hidden),
    }  # fmt: skip
    ones = np.ones(hidden, dtype=np.float32)
    tensors: Tensors = {
        "model.embed_tokens.weight": ("BF16", random.normal(size=(len(words), hidden)).astype(np.float32))
    }
    for layer in range(layers):
        for module, shape in shapes.items():
            values = random.normal(size=shape).astype(np.float32) / np.sqrt(shape[1])
            tensors[f"model.layers.{layer}.{module}.weight"] = ("BF16", values)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = ("BF16", ones)
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] = ("BF16", ones)
    tensors["model.norm.weight"] = ("BF16", ones)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    )
    write_safetensors(directory / "model.safetensors", tensors)
    return load_base_family(name, directory)


def lora_weights(
    base: BaseFamily, *, seed: int, rank: int, scaling: float, scale: float, modules: Iterable[str], dtype: str = "F32"
) -> Tensors:
    """Random factors; an input of unit size changes each layer's output by about `scale`."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {}
    for module, (outputs, inputs) in sorted(base.module_shapes.items()):
        if module.rpartition(".")[2] in set(modules):
            a = random.normal(size=(rank, inputs)).astype(np.float32) / np.sqrt(inputs)
            b = random.normal(size=(outputs, rank)).astype(np.float32) * (scale / scaling / np.sqrt(rank))
            tensors[f"base_model.model.{module}.lora_A.weight"] = (dtype, a.astype(np.float32))
            tensors[f"base_model.model.{module}.lora_B.weight"] = (dtype, b.astype(np.float32))
    return tensors


def peft_config(base: BaseFamily, *, rank: int, alpha: float, modules: Iterable[str], **fields: Any) -> dict[str, Any]:
    """`adapter_config.json` as PEFT 0.21 writes it, the trainer's path and all."""
    return {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
        "base_model_name_or_path": str(base.path), "bias": "none", "corda_config": None, "ensure_weight_tying": False,
        "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "kasa_config": None, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
        "lora_alpha": alpha, "lora_bias": False, "lora_dropout": 0.05, "lora_ga_config": None, "megatron_config": None,
        "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA",
        "peft_version": "0.21.2", "qalora_group_size": 16, "r": rank, "rank_pattern": {}, "revision": None,
        "target_modules": list(modules), "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
        "use_bdlora": None, "use_dora": False, "use_qalora": False, "use_rslora": False, "velora_config": None, **fields,
    }  # fmt: skip


def make_adapter(
    directory: Path, base: BaseFamily, *, seed: int = 0, rank: int = 8, alpha: float = 16, scale: float = 0.3,
    modules: Iterable[str] = ("q_proj", "v_proj"), dtype: str = "F32", **fields: Any,
) -> Path:  # fmt: skip
    """A plain PEFT folder; `fields` replace those of its config. Returns the folder."""
    modules = tuple(modules)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = lora_weights(base, seed=seed, rank=rank, scaling=alpha / rank, scale=scale, modules=modules, dtype=dtype)
    config = peft_config(base, rank=rank, alpha=alpha, modules=modules, **fields)
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    write_safetensors(directory / WEIGHTS, tensors)
    return directory


def make_bundle(
    directory: Path, base: BaseFamily, *, adapter: str = "support", note: str = "", **adapter_options: Any
) -> Path:
    """A PEFT folder with a manifest; another `note` makes another manifest of the same weights."""
    make_adapter(directory, base, **adapter_options)
    manifest = {
        "schema_version": 1, "adapter": adapter, "base_model": base.name, "base_digest": base.digest,
        "tokenizer_digest": base.tokenizer_digest, "chat_template_digest": base.chat_template_digest, "rank": 8, "alpha": 16,
        "target_modules": ["q_proj", "v_proj"], "datasets": [{"role": "train", "digest": "0" * 64, "rows": 800}],
        "recipe": {"name": "sft", "seed": 0, "note": note}, "versions": {"peft": "0.21.2"}, "device": "cpu",
        "metrics": {"loss": 0.25}, "wall_s": 1.5, "tokens": 1000,
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


# ---- Breaking ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BadAdapter:
    """One way to be wrong: the reason code it must be refused with, by whom, and how to make one."""

    code: str
    build: Callable[[Path, BaseFamily], None]
    refused_by: Literal["preflight", "verify"] = "preflight"
    needs_directory: bool = False  # lies in the folder around the three files, so an upload of those cannot carry it


Edit = Callable[[Tensors, BaseFamily], Tensors]


def _config(**fields: Any) -> Callable[[Path, BaseFamily], None]:
    def build(directory: Path, base: BaseFamily) -> None:
        make_adapter(directory, base, **fields)

    return build


def _tensors(edit: Edit, **options: Any) -> Callable[[Path, BaseFamily], None]:
    def build(directory: Path, base: BaseFamily) -> None:
        make_adapter(directory, base, **{key: value for key, value in options.items() if key != "tensor_rank"})
        rank = options.get("tensor_rank", 8)
        tensors = lora_weights(base, seed=0, rank=rank, scaling=2.0, scale=0.3, modules=("q_proj", "v_proj"))
        write_safetensors(directory / WEIGHTS, edit(tensors, base))

    return build


def _files(edit: Callable[[Path], object]) -> Callable[[Path, BaseFamily], None]:
    def build(directory: Path, base: BaseFamily) -> None:
        make_adapter(directory, base)
        edit(directory)

    return build


def _manifest(**fields: Any) -> Callable[[Path, BaseFamily], None]:
    def build(directory: Path, base: BaseFamily) -> None:
        make_bundle(directory, base)
        manifest = json.loads((directory / "manifest.json").read_text())
        (directory / "manifest.json").write_text(json.dumps({**manifest, **fields}))

    return build


def _renamed(old: str, new: str) -> Edit:
    return lambda tensors, base: {name.replace(old, new): value for name, value in tensors.items()}


def _with(name: str, dtype: str, shape: Callable[[BaseFamily], tuple[int, ...]]) -> Edit:
    return lambda tensors, base: {**tensors, name: (dtype, np.ones(shape(base), dtype=np.float32))}


def _one_value(value: float, *, side: str = "lora_A") -> Edit:
    def edit(tensors: Tensors, base: BaseFamily) -> Tensors:
        name = next(name for name in tensors if side in name)
        dtype, values = tensors[name]
        values = values.copy()
        values.flat[values.size // 2] = value
        return {**tensors, name: (dtype, values)}

    return edit


def _every(change: Callable[[NDArray[Any]], NDArray[Any]], *, side: str = "") -> Edit:
    return lambda tensors, base: {
        name: (dtype, change(values) if side in name else values) for name, (dtype, values) in tensors.items()
    }


def _only(side: str) -> Edit:
    return lambda tensors, base: {name: value for name, value in tensors.items() if side in name}


def _half_the_layers(tensors: Tensors, base: BaseFamily) -> Tensors:
    return {name: value for name, value in tensors.items() if ".layers.0." in name}


def _flip_exponent_bits(values: NDArray[Any]) -> NDArray[Any]:
    """Every seventh number 256 times larger, as one flipped bit of the exponent does: finite, and never above 100."""
    bits = values.astype("<f4").view("<u4").copy()
    flat = bits.reshape(-1)
    flat[::7] |= np.uint32(8 << 23)
    flipped = bits.view("<f4")
    return np.where(np.abs(flipped) < 100, flipped, values).astype(np.float32)


def _pickle(directory: Path) -> None:
    class Planted:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(directory / "planted"),))

    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Planted()))


def _pickle_only(directory: Path) -> None:
    _pickle(directory)
    (directory / WEIGHTS).unlink()


def _link(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "elsewhere")
    (directory / WEIGHTS).symlink_to(directory / "elsewhere")


def _directory_for_weights(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).mkdir()


def _other_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {"other": 0}}}))


def _weights(content: bytes) -> Callable[[Path, BaseFamily], None]:
    return _files(lambda directory: (directory / WEIGHTS).write_bytes(content))


def _cut(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:-100])


def _hidden(base: BaseFamily) -> int:
    return next(inputs for module, (_, inputs) in base.module_shapes.items() if module.endswith("q_proj"))


_Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
_BOMB = struct.pack("<Q", 2**62) + b"{}"
_DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"

BAD: dict[str, BadAdapter] = {
    # files
    "truncated_weights": BadAdapter("bad_safetensors", _files(_cut)),
    "garbage_weights": BadAdapter("bad_safetensors", _weights(b"\x07" * 4096)),
    "empty_weights": BadAdapter("bad_safetensors", _weights(b"")),
    "no_tensors": BadAdapter("bad_safetensors", _weights(struct.pack("<Q", 2) + b"{}")),
    "header_bomb": BadAdapter("bad_safetensors", _weights(_BOMB)),
    "nested_header": BadAdapter("bad_safetensors", _weights(struct.pack("<Q", len(_DEEP)) + _DEEP)),
    "html_for_weights": BadAdapter("bad_safetensors", _weights(b"<!doctype html><title>404</title>")),
    "missing_weights": BadAdapter("missing_weights", _files(lambda d: (d / WEIGHTS).unlink())),
    "missing_config": BadAdapter("missing_config", _files(lambda d: (d / CONFIG).unlink())),
    "bad_json": BadAdapter("bad_config", _files(lambda d: (d / CONFIG).write_text("{'r': 8}"))),
    "config_is_a_list": BadAdapter("bad_config", _files(lambda d: (d / CONFIG).write_text("[]"))),
    "pickle_only": BadAdapter("pickle_weights", _files(_pickle_only), needs_directory=True),
    "pickle_beside": BadAdapter("pickle_weights", _files(_pickle), needs_directory=True),
    "linked_weights": BadAdapter("not_a_file", _files(_link), needs_directory=True),
    "directory_for_weights": BadAdapter("not_a_file", _files(_directory_for_weights), needs_directory=True),
    # what the config says
    "ia3": BadAdapter("peft_type", _config(peft_type="IA3")),
    "no_peft_type": BadAdapter("peft_type", _config(peft_type=None)),
    "classifier": BadAdapter("task_type", _config(task_type="SEQ_CLS")),
    "rank_is_text": BadAdapter("bad_config", _config(r="8")),
    "rank_above_max": BadAdapter("rank_too_high", _config(rank=32)),
    "rank_pattern_above_max": BadAdapter("rank_too_high", _config(rank_pattern={"q_proj": 512})),
    "regular_expression": BadAdapter("bad_pattern", _config(rank_pattern={"(a+)+$": 8})),
    "dora": BadAdapter("dora", _config(use_dora=True)),
    "pissa": BadAdapter("base_changing_init", _config(init_lora_weights="pissa_niter_16")),
    "olora": BadAdapter("base_changing_init", _config(init_lora_weights="olora")),
    "loftq": BadAdapter("base_changing_init", _config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})),
    "corda": BadAdapter("base_changing_init", _config(init_lora_weights="corda", corda_config={"corda_method": "ipm"})),
    "modules_to_save": BadAdapter("modules_to_save", _config(modules_to_save=["lm_head"])),
    "trainable_token_indices": BadAdapter("trainable_tokens", _config(trainable_token_indices=[1, 2])),
    "lora_bias": BadAdapter("lora_bias", _config(lora_bias=True)),
    "trained_bias": BadAdapter("bias", _config(bias="all")),
    "alora": BadAdapter("alora", _config(alora_invocation_tokens=[1, 2])),
    "qalora": BadAdapter("qalora", _config(use_qalora=True)),
    "bdlora": BadAdapter("bdlora", _config(use_bdlora={"nblocks": 2})),
    "layer_replication": BadAdapter("layer_replication", _config(layer_replication=[[0, 1], [0, 1]])),
    "target_parameters": BadAdapter("target_parameters", _config(target_parameters=["experts.down_proj"])),
    "arrow": BadAdapter("lora_variant", _config(arrow_config={"top_k": 2})),
    "field_of_the_future": BadAdapter("unknown_field", _config(use_something_new=True)),
    "huge_alpha": BadAdapter("magnitude", _config(lora_alpha=1e9)),
    "zero_alpha": BadAdapter("no_effect", _config(lora_alpha=0)),
    "config_rank_too_low": BadAdapter("rank_mismatch", _tensors(lambda t, b: t, tensor_rank=16)),
    "config_rank_too_high": BadAdapter("rank_mismatch", _tensors(lambda t, b: t, tensor_rank=4)),
    "wrong_base_named": BadAdapter("wrong_base", _config(base_model_name_or_path="Qwen/Qwen2-0.5B")),
    # what the tensors say
    "other_module_names": BadAdapter("unknown_module", _tensors(_renamed("model.layers.", "transformer.h."))),
    "names_that_match_nothing": BadAdapter("unknown_module", _tensors(_renamed("model.layers.", "language_model.layers."))),
    "no_prefix": BadAdapter("unknown_tensor", _tensors(_renamed("base_model.model.", ""))),
    "extra_layer": BadAdapter(
        "unknown_layer",
        _tensors(
            lambda t, b: {**t, **{n.replace("layers.0.", "layers.99."): v for n, v in t.items() if "layers.0." in n}}
        ),
    ),
    "other_shapes": BadAdapter("wrong_shape", _tensors(_every(lambda v: np.concatenate([v, v], axis=1), side="lora_A"))),
    "lost_layers": BadAdapter("target_mismatch", _tensors(_half_the_layers)),
    "only_lora_a": BadAdapter("unpaired", _tensors(_only("lora_A"))),
    "only_lora_b": BadAdapter("unpaired", _tensors(_only("lora_B"))),
    "dora_weights": BadAdapter("dora", _tensors(_with(_Q0 + ".lora_magnitude_vector", "F32", lambda b: (_hidden(b),)))),
    "bias_weights": BadAdapter("lora_bias", _tensors(_with(_Q0 + ".lora_B.bias", "F32", lambda b: (_hidden(b),)))),
    "saved_embeddings": BadAdapter(
        "embeddings", _tensors(_with("base_model.model.model.embed_tokens.weight", "F32", lambda b: (b.vocab_size, _hidden(b))))
    ),
    "lora_on_lm_head": BadAdapter(
        "embeddings", _tensors(_with("base_model.model.lm_head.lora_A.weight", "F32", lambda b: (8, _hidden(b))))
    ),
    "double_precision": BadAdapter("dtype", _tensors(lambda t, b: {n: ("F64", v) for n, (_, v) in t.items()})),
    "whole_numbers": BadAdapter("dtype", _tensors(lambda t, b: {n: ("I32", np.ones_like(v)) for n, (_, v) in t.items()})),
    "all_nan": BadAdapter("non_finite", _tensors(_every(lambda v: np.full_like(v, np.nan)))),
    "one_nan": BadAdapter("non_finite", _tensors(_one_value(float("nan")))),
    "one_infinity": BadAdapter("non_finite", _tensors(_one_value(float("-inf"), side="lora_B"))),
    "times_1e30": BadAdapter("magnitude", _tensors(_every(lambda v: (v * 1e30).astype(np.float32), side="lora_B"))),
    "one_huge_value": BadAdapter("magnitude", _tensors(_one_value(-1e30))),
    "zero_lora_b": BadAdapter("no_effect", _tensors(_every(np.zeros_like, side="lora_B"))),
    # what the manifest says
    "manifest_garbage": BadAdapter("bad_manifest", _files(lambda d: (d / "manifest.json").write_text("{"))),
    "manifest_bad_digest": BadAdapter("bad_manifest", _manifest(base_digest="../../etc/passwd")),
    "manifest_other_base": BadAdapter("wrong_base", _manifest(base_digest="1" * 64)),
    "manifest_other_tokenizer": BadAdapter("wrong_tokenizer", _manifest(tokenizer_digest="1" * 64)),
    "manifest_other_template": BadAdapter("wrong_chat_template", _manifest(chat_template_digest="1" * 64)),
    "manifest_other_weights": BadAdapter("digest_mismatch", _manifest(files={WEIGHTS: "1" * 64})),
    "other_tokenizer_beside": BadAdapter("wrong_tokenizer", _files(_other_tokenizer), needs_directory=True),
    "other_template_beside": BadAdapter("wrong_chat_template", _files(lambda d: (d / "chat_template.jinja").write_text("{{ x }}")), needs_directory=True),
    # what only running it shows
    "bit_flips": BadAdapter("log_loss", _tensors(_every(_flip_exponent_bits)), "verify"),
    "wrong_base_unnamed": BadAdapter("log_loss", _config(base_model_name_or_path=None, scale=30.0), "verify"),
    "diverged": BadAdapter("log_loss", _tensors(_every(lambda v: np.sign(v) * 50)), "verify"),
    "no_measurable_effect": BadAdapter("no_effect", _config(scale=1e-12), "verify"),
}  # fmt: skip
