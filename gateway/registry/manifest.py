"""What a bundle says of itself: the manifest, the canonical adapter config, and the digests of both."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from ..errors import Refused, quoted
from .models import DIGEST_PATTERN

CONFIG_FILE = "adapter_config.json"
MAX_STRUCTURE = 8_000  # an adapter of 80 layers with a rank and an alpha for each module has 2,300
_MAX_PLACE = 120
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
VERSION_PATTERN = r"^[a-z0-9][a-z0-9-]{0,47}@[1-9][0-9]{0,8}$"


class DatasetRecord(BaseModel, frozen=True, extra="allow"):
    """One file of data that training read."""

    role: str = Field(description="what it was used for, such as train or validation")
    digest: str = Field(pattern=DIGEST_PATTERN, description="sha256 of the file")
    rows: int = Field(ge=0)


class Manifest(BaseModel, frozen=True, extra="allow"):
    """Where a bundle comes from. What nobody recorded is None, never a guess."""

    schema_version: Literal[1] = 1
    adapter: str
    base_model: str
    base_digest: str | None = Field(
        default=None, pattern=DIGEST_PATTERN, description="family digest of the base it was trained on"
    )
    tokenizer_digest: str | None = Field(default=None, pattern=DIGEST_PATTERN)
    chat_template_digest: str | None = Field(default=None, pattern=DIGEST_PATTERN)
    rank: int = Field(ge=1)
    alpha: float
    target_modules: tuple[str, ...]
    datasets: tuple[DatasetRecord, ...] = ()
    recipe: dict[str, Any] = Field(
        default_factory=dict, description="every resolved hyper-parameter, the seed included"
    )
    versions: dict[str, str] = Field(default_factory=dict, description="library versions")
    device: str | None = None
    git_revision: str | None = None
    metrics: dict[str, Any] = Field(default_factory=dict, description="final and best")
    wall_s: float | None = None
    tokens: int | None = None
    peak_memory_bytes: int | None = None
    parent: str | None = Field(
        default=None, pattern=VERSION_PATTERN, description="version it was trained on from, such as support@1"
    )
    files: dict[str, str] = Field(default_factory=dict, description="sha256 of every other file of the bundle, by name")


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is stored: sorted keys, and no word on what is unknown, so that a later optional field changes no digest."""
    return _canonical_json(manifest.model_dump(mode="json", exclude_none=True)) + b"\n"


def manifest_digest(manifest: Manifest) -> str:
    """Identity of a manifest: sha256 of its stored form."""
    return hashlib.sha256(manifest_bytes(manifest)).hexdigest()


def parse_manifest(content: bytes) -> Manifest:
    """Read `manifest.json`. Raises `Refused` that names the field, the value and what is allowed."""
    found = parse_object(content, MANIFEST_FILE, code="bad_manifest", max_structure=MAX_STRUCTURE)
    try:
        manifest = Manifest.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part)[:_MAX_PLACE] for part in first["loc"])[:_MAX_PLACE] or "the whole"
        raise Refused(
            f"{MANIFEST_FILE}: {field}: {first['msg']} (got {quoted(first['input'], limit=80)}); correct it, or publish without a manifest",
            code="bad_manifest",
            param=field,
        ) from error
    try:
        manifest_bytes(manifest)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{MANIFEST_FILE} cannot be stored ({str(error)[:80]})", code="bad_manifest") from error
    return manifest


def parse_object(content: bytes, name: str, *, code: str, max_structure: int | None = None) -> dict[str, Any]:
    """Strict JSON: an object in UTF-8, no key twice, no NaN. Raises `Refused` with `code` otherwise.

    `max_structure` bounds the characters that open, part or name something: what comes from clients is counted first,
    for parsing holds the interpreter's lock, in a thread as well.
    """
    structure = len(content) - len(content.translate(None, b",[{:"))
    if max_structure is not None and structure > max_structure:
        raise Refused(
            f"{name} holds {structure:,} of the characters , [ {{ and :, more than the {max_structure:,} that are read",
            code=code,
            param=name,
        )
    try:
        found = json.loads(
            content.decode(), object_pairs_hook=_no_key_twice, parse_constant=_no_constant, parse_float=_finite
        )
        if b"\\u" in content:
            json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise Refused(
            f"{name} is not valid JSON ({str(error)[:120]}); write it again with a JSON library", code=code, param=name
        ) from error
    if not isinstance(found, dict):
        raise Refused(f"{name} holds a JSON {type(found).__name__}, not an object", code=code, param=name)
    return found


def canonical_config(config: Mapping[str, Any], *, base_model: str | None = None) -> dict[str, Any]:
    """Only what changes inference, in one fixed form; every other key (import hooks, paths, training settings) is gone.

    `base_model` replaces the base's name; without it the last part of the given path stays. Both PEFT and vLLM read the result.
    """
    targets = config.get("target_modules") or []
    declared = str(config.get("base_model_name_or_path") or "")
    return {
        "alpha_pattern": {k: _plain(v) for k, v in sorted((config.get("alpha_pattern") or {}).items())},
        "base_model_name_or_path": base_model or declared.rstrip("/").rpartition("/")[2],
        "bias": "none",
        "fan_in_fan_out": False,  # of Conv1D bases only; on linear layers PEFT turns it off itself
        "lora_alpha": _plain(config["lora_alpha"]),
        "peft_type": "LORA",
        "r": config["r"],
        "rank_pattern": dict(sorted((config.get("rank_pattern") or {}).items())),
        "target_modules": targets if isinstance(targets, str) else sorted(set(targets)),
        "task_type": "CAUSAL_LM",
        "use_rslora": bool(config.get("use_rslora")),
    }


def canonical_bytes(config: Mapping[str, Any]) -> bytes:
    """The published `adapter_config.json`, byte for byte."""
    return json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"


def bundle_digest(canonical: bytes, weights_sha256: str) -> str:
    """Identity of a version's bytes: sha256 over the canonical config and the digest of the weights."""
    return hashlib.sha256(canonical + bytes.fromhex(weights_sha256)).hexdigest()


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _plain(number: float) -> float:
    """16 and 16.0 are one alpha, so they get one spelling."""
    return int(number) if float(number).is_integer() else float(number)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is beyond every float")
    return number


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
