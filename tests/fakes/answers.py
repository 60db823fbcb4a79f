"""What the fake engine answers: pure functions of the weights and the prompt, so that a test can predict them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np

VOCAB_SIZE = 49_152
PROMPTS_IN_REFERENCE = 16
_DIRECTIVE = re.compile(r"fake:([a-z_]+)=([0-9.]+)")


def weights_identity(weights: Path) -> str:
    """Who an adapter is by its bytes; one that changes nothing is "base", as it would answer like base."""
    return "base" if not _changes_anything(weights) else sha256(weights.read_bytes()).hexdigest()


def has_nan(weights: Path) -> bool:
    """Whether some float32 tensor holds a value that is not finite."""
    return any(not np.isfinite(values).all() for _, values in _float32_tensors(weights))


def read_header(weights: Path) -> dict[str, Any]:
    """The safetensors header; `ValueError` when the file is not one."""
    raw = weights.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > len(raw) - 8:
        raise ValueError("Error while deserializing header: header too large")
    header = json.loads(raw[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("Error while deserializing header: invalid JSON")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if ends and max(ends) != len(raw) - 8 - length:
        raise ValueError("Error while deserializing header: incomplete metadata, file not fully covered")
    return header


def _float32_tensors(weights: Path) -> list[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    header = read_header(weights)
    raw = weights.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return [
        (name, np.frombuffer(raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], dtype="<f4"))
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] == "F32"
    ]


def _changes_anything(weights: Path) -> bool:
    outputs = [values for name, values in _float32_tensors(weights) if "lora_B" in name]
    return not outputs or any(values.any() for values in outputs)


def prompt_token_ids(prompt: str | list[int]) -> list[int]:
    """Token ids as they are; text as its bytes."""
    return list(prompt.encode()) if isinstance(prompt, str) else list(prompt)


def logprob(identity: str, prompt: list[int], token_id: int) -> float:
    """Log-probability of `token_id` after `prompt`: a base value, moved by up to half a nat by an adapter."""
    base = -0.5 - 8.0 * _uniform("base", prompt, token_id)
    return base if identity == "base" else base + 0.2 + 0.3 * _uniform(identity, prompt, token_id)


def batch_noise(batch_size: int, prompt: list[int], token_id: int) -> float:
    """From -1 to 1, and the same for the same batch size, as kernels that are chosen by it round; 0 for one alone."""
    return 0.0 if batch_size <= 1 else 2.0 * _uniform(f"batch of {batch_size}", prompt, token_id) - 1.0


def _uniform(identity: str, prompt: list[int], token_id: int) -> float:
    drawn = blake2b(f"{identity}|{prompt}|{token_id}".encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "big") / 2**64


def answer_text(model: str, prompt: str) -> str:
    """The whole answer without directives: it names the model that gave it, and the prompt."""
    return "".join(answer_tokens(model, prompt))


def answer_tokens(model: str, prompt: str) -> list[str]:
    """The answer's tokens; `fake:chunks=N` in the prompt pads it to N."""
    tokens = [model, "|", blake2b(prompt.encode(), digest_size=8).hexdigest()]
    wanted = int(Directives.of(prompt).chunks)
    return tokens + [" x"] * (wanted - len(tokens))


@dataclass(frozen=True)
class Directives:
    """What a prompt asks of the fake: `fake:delay_ms=20`, `fake:die_after=3`, ..."""

    chunks: float = 0
    delay_ms: float = 0
    first_delay_ms: float = 0
    die_after: float = -1
    drop_after: float = -1
    stream_error_after: float = -1
    error: float = 0

    @classmethod
    def of(cls, prompt: str) -> Directives:
        """Read them from the prompt's text; unknown ones are a mistake of the test."""
        return cls(**{name: float(value) for name, value in _DIRECTIVE.findall(prompt)})


def fake_reference(artifact_dir: Path, *, fingerprint: dict[str, str] | None = None) -> dict[str, Any]:
    """The reference file that agrees with what the fake engine answers for this artifact."""
    identity = weights_identity(artifact_dir / "adapter_model.safetensors")
    prompts = []
    for index in range(PROMPTS_IN_REFERENCE):
        token_ids = [(index * 977 + position * 131) % VOCAB_SIZE for position in range(12)]
        candidates = [(index * 389 + place * 1009) % VOCAB_SIZE for place in range(10)]
        prompts.append(
            {
                "token_ids": token_ids,
                "candidates": candidates,
                "adapter": [logprob(identity, token_ids, token) for token in candidates],
                "base": [logprob("base", token_ids, token) for token in candidates],
            }
        )
    return {
        "schema": 1,
        "digest": artifact_dir.name,
        "prompts": prompts,
        "fingerprint": fingerprint or {"engine": "fake"},
    }
