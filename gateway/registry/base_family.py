"""The base model that adapters bind to: what it is, by digest, and which linear layers it has."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from ..errors import Invalid, Refused
from .manifest import parse_object
from .models import DIGEST_PATTERN
from .tensors import MAX_BASE_HEADER_BYTES, TensorInfo, chunks, read_header

# Lookup tables and the output head: two-dimensional, but not layers that an adapter may change here.
_NOT_LINEAR = frozenset({"embed_tokens", "wte", "wpe", "word_embeddings", "embeddings", "lm_head"})
# Words in config.json that change with the tool that wrote it, not with the model.
_CONFIG_NOISE = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"})
# Written into a saved tokenizer by whoever used it last; no part of how text becomes tokens here.
_TOKENIZER_NOISE = frozenset({"padding", "truncation"})

# A declared base with one of these words names a model family; any other text (a folder of the trainer's) says nothing.
_FAMILY_WORDS = re.compile(
    r"(?<![a-z])(smollm|llama|qwen|mistral|mixtral|gemma|phi|gpt|falcon|granite|olmo|pythia|bloom|opt|deepseek|yi|stablelm|mpt|command-r|internlm)(?![a-z])"
)
_QUANTISED = re.compile(r"(-(unsloth|bnb|4bit|8bit|awq|gptq|gguf|fp8|int8|int4|bf16|fp16|hf))+$")

# Hashing takes seconds per gigabyte. Keyed by every file's path, size and time of change.
_loaded: dict[tuple[Any, ...], BaseFamily] = {}


class BaseFamily(BaseModel, frozen=True):
    """One base model. Every serving of it (bf16, fp8, ...) belongs to the same family, and so do its adapters."""

    name: str = Field(description="name that requests and bundles use")
    path: Path
    digest: str = Field(pattern=DIGEST_PATTERN, description="over config, tokenizer, chat template and weights")
    weights_digest: str = Field(pattern=DIGEST_PATTERN)
    tokenizer_digest: str = Field(pattern=DIGEST_PATTERN)
    chat_template_digest: str = Field(pattern=DIGEST_PATTERN)
    vocab_size: int = Field(ge=1)
    module_shapes: dict[str, tuple[int, int]] = Field(description="linear layer -> (outputs, inputs)")
    also_called: frozenset[str] = Field(default=frozenset(), description="names that others may know it by")


def load_base_family(name: str, path: Path) -> BaseFamily:
    """Read a folder in Hugging Face format. Raises `Invalid` that names what is missing."""
    path = path.expanduser().resolve()
    shards = sorted(path.glob("*.safetensors"))
    files = [path / "config.json", path / "tokenizer.json", *shards]
    missing = [file.name for file in files if not file.is_file()] + ([] if shards else ["model.safetensors"])
    if missing:
        raise Invalid(
            f"base model {name!r}: {path} has no {', '.join(missing)}; run `make base-model`, or set TURNOUT_BASE_MODEL__PATH",
            code="bad_base_model",
        )
    optional = [file for file in (path / "chat_template.jinja", path / "tokenizer_config.json") if file.is_file()]
    key = (name, *((str(file), *_stamp(file)) for file in (*files, *optional)))
    if key not in _loaded:
        try:
            _loaded[key] = _read(name, path, shards)
        except Refused as error:
            raise Invalid(f"base model {name!r} in {path}: {error.message}", code="bad_base_model") from error
    return _loaded[key]


def tokenizer_digest(content: bytes) -> str:
    """Identity of a `tokenizer.json`: what it does to text, whoever saved it."""
    found = parse_object(content, "tokenizer.json", code="wrong_tokenizer")
    return _digest({key: value for key, value in found.items() if key not in _TOKENIZER_NOISE})


def chat_template_digest(template: bytes) -> str:
    """Identity of a chat template; of the empty text where there is none."""
    return hashlib.sha256(template).hexdigest()


def is_other_model(declared: str, base: BaseFamily) -> bool:
    """Whether a declared base is the name of a model, and of another one. A folder of the trainer's machine says nothing."""
    if declared == base.name:
        return False
    last = _squeezed(declared)
    if last in {_squeezed(name) for name in base.also_called}:
        return False
    return _FAMILY_WORDS.search(last) is not None


def _squeezed(name: str) -> str:
    last = name[-300:].replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    return _QUANTISED.sub("", re.sub(r"[\s_]+", "-", last))


def _read(name: str, path: Path, shards: list[Path]) -> BaseFamily:
    config = parse_object((path / "config.json").read_bytes(), "config.json", code="bad_base_model")
    shapes: dict[str, tuple[int, int]] = {}
    tensors: dict[str, str] = {}
    for shard in shards:
        descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for tensor in read_header(descriptor, max_header_bytes=MAX_BASE_HEADER_BYTES):
                tensors[tensor.name] = _tensor_digest(descriptor, tensor)
                shapes.update(_linear(tensor))
        finally:
            os.close(descriptor)
    tokenizer = tokenizer_digest((path / "tokenizer.json").read_bytes())
    template = chat_template_digest(_chat_template(path))
    weights = _digest(tensors)
    parts = {
        "config": {key: value for key, value in config.items() if key not in _CONFIG_NOISE},
        "tokenizer": tokenizer, "chat_template": template, "weights": weights,
    }  # fmt: skip
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int):
        raise Invalid(f"base model {name!r}: config.json has no vocab_size", code="bad_base_model")
    return BaseFamily(
        name=name, path=path, digest=_digest(parts), weights_digest=weights, tokenizer_digest=tokenizer,
        chat_template_digest=template, vocab_size=vocabulary, module_shapes=shapes,
        also_called=frozenset(name for name in (path.name, config.get("_name_or_path")) if isinstance(name, str) and name),
    )  # fmt: skip


def _linear(tensor: TensorInfo) -> dict[str, tuple[int, int]]:
    module, _, kind = tensor.name.rpartition(".")
    if kind != "weight" or len(tensor.shape) != 2 or module.rpartition(".")[2] in _NOT_LINEAR:
        return {}
    return {module: (tensor.shape[0], tensor.shape[1])}


def _tensor_digest(descriptor: int, tensor: TensorInfo) -> str:
    """Per tensor, so that how the weights are split over files does not matter."""
    digest = hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode())
    for chunk in chunks(descriptor, tensor.begin, tensor.end):
        digest.update(chunk)
    return digest.hexdigest()


def _chat_template(path: Path) -> bytes:
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_bytes()
    if not (path / "tokenizer_config.json").is_file():
        return b""
    found = parse_object((path / "tokenizer_config.json").read_bytes(), "tokenizer_config.json", code="bad_base_model")
    template = found.get("chat_template") or ""
    return (template if isinstance(template, str) else json.dumps(template, sort_keys=True)).encode()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_size, found.st_mtime_ns
