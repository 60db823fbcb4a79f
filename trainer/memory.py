"""How much memory training will take, and whether there is that much. Light: reads the base's `config.json` only.

    peak = runtime + base weights + 16 bytes per adapter weight + activations + scores of the vocabulary

- An adapter weight costs 16 bytes: the weight, its gradient and Adam's two moments, each in 4 bytes.
- Activations held for the backward pass, per token and layer: `_HIDDEN_BYTES` x hidden + `_FFN_BYTES` x intermediate,
  and with eager attention `_SCORE_BYTES` x heads x row length for the attention scores.
- The scores of the vocabulary are held for answer tokens only, in `_VOCABULARY_BYTES` bytes each.
The constants are set so that the estimate is high rather than low: on the demo's base model it is 10 to 50 % above the
measured peak, from 2 x 421 tokens with gradient checkpointing (1.9 GiB against 1.4) to 8 x 146 without (4.9 against 4.3).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import psutil

from .config import SFTConfig
from .errors import BadConfig, DoesNotFit

_RUNTIME_BYTES = 900 * 2**20  # Python with torch, transformers and TRL loaded
_ADAPTER_BYTES = 16
_HIDDEN_BYTES = 60
_FFN_BYTES = 24
_SCORE_BYTES = 14
_VOCABULARY_BYTES = 14
_HEADROOM = 0.95


@dataclass(frozen=True)
class ModelShape:
    """The few numbers of a base model that memory depends on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    weights_bytes: int
    linear_sizes: int  # sum of (inputs + outputs) over all linear layers of the model


@dataclass(frozen=True)
class MemoryEstimate:
    """The terms of the sum, in bytes."""

    runtime: int
    base: int
    adapter: int
    activations: int
    vocabulary: int

    @property
    def total(self) -> int:
        """Peak bytes."""
        return self.runtime + self.base + self.adapter + self.activations + self.vocabulary

    def arithmetic(self) -> str:
        """The sum, written out."""
        terms = (
            f"{self.runtime / 2**30:.2f} runtime", f"{self.base / 2**30:.2f} base model",
            f"{self.adapter / 2**30:.2f} adapter and optimizer", f"{self.activations / 2**30:.2f} activations",
            f"{self.vocabulary / 2**30:.2f} vocabulary scores",
        )  # fmt: skip
        return f"{' + '.join(terms)} = {self.total / 2**30:.2f} GiB"


def read_shape(base_model: Path, *, precision_bytes: int) -> ModelShape:
    """Read `config.json`. Raises `BadConfig` when it is not of a causal language model with known sizes."""
    try:
        found = json.loads((base_model / "config.json").read_text())
        hidden, layers = int(found["hidden_size"]), int(found["num_hidden_layers"])
        intermediate, heads = int(found["intermediate_size"]), int(found["num_attention_heads"])
        vocabulary = int(found["vocab_size"])
        head = int(found.get("head_dim") or hidden // heads)
        key_value = int(found.get("num_key_value_heads") or heads) * head
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadConfig(
            f"base_model {base_model}: config.json cannot be read ({error!r})", param="base_model"
        ) from error
    query = heads * head
    pairs = [(hidden, query), (hidden, key_value), (hidden, key_value), (query, hidden)] + 3 * [(hidden, intermediate)]
    embeddings = vocabulary * hidden * (1 if found.get("tie_word_embeddings") else 2)
    weights = layers * sum(inputs * outputs for inputs, outputs in pairs) + embeddings
    return ModelShape(
        hidden=hidden, intermediate=intermediate, layers=layers, heads=heads, vocabulary=vocabulary,
        weights_bytes=weights * precision_bytes, linear_sizes=layers * sum(sum(pair) for pair in pairs),
    )  # fmt: skip


def estimate(config: SFTConfig, shape: ModelShape, *, longest: int) -> MemoryEstimate:
    """The peak of a training whose longest row has so many tokens."""
    tokens = config.batch_size * longest
    held_layers = shape.layers
    per_token = _HIDDEN_BYTES * shape.hidden + _FFN_BYTES * shape.intermediate
    if config.attention == "eager":
        per_token += _SCORE_BYTES * shape.heads * longest
    activations = tokens * per_token * held_layers
    if config.gradient_checkpointing:
        activations = tokens * (per_token + 2 * shape.hidden * shape.layers)
    return MemoryEstimate(
        runtime=_RUNTIME_BYTES,
        base=shape.weights_bytes,
        adapter=_ADAPTER_BYTES * config.rank * shape.linear_sizes,
        activations=activations,
        vocabulary=_VOCABULARY_BYTES * shape.vocabulary * tokens,
    )


def available_bytes() -> int:
    """Memory that this machine, or the container around us, has left."""
    return min([psutil.virtual_memory().available, *_cgroup_left()])


def require_memory(needed: MemoryEstimate, available: int) -> None:
    """Raises `DoesNotFit` with the arithmetic."""
    if needed.total <= _HEADROOM * available:
        return
    raise DoesNotFit(
        f"training needs about {needed.arithmetic()}, and {available / 2**30:.2f} GiB are free: "
        "lower batch_size (raise gradient_accumulation in turn), lower max_length, or set gradient_checkpointing=true"
    )


def _cgroup_left() -> list[int]:
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        cached = {k: int(v) for k, v in (line.split() for line in (root / "memory.stat").read_text().splitlines())}
    except (OSError, ValueError):
        return []
    return [int(limit) - used + cached.get("inactive_file", 0)] if limit.isdigit() else []
