"""The bundle: weights, the canonical config, and a manifest that says where they come from. Light: no torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path

from gateway.durable import fsync, fsync_tree
from gateway.registry.base_family import BaseFamily
from gateway.registry.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    DatasetRecord,
    Manifest,
    bundle_digest,
    canonical_bytes,
    canonical_config,
    manifest_bytes,
)

from .config import SFTConfig

_LIBRARIES = ("accelerate", "peft", "safetensors", "tokenizers", "torch", "transformers", "trl", "turnout")


def export_bundle(
    peft_folder: Path,
    bundle: Path,
    config: SFTConfig,
    base: BaseFamily,
    *,
    datasets: tuple[DatasetRecord, ...],
    device: str,
    metrics: dict[str, float],
    wall_s: float,
    tokens: int,
    peak_memory_bytes: int,
) -> str:
    """Turn what PEFT saved into a bundle that appears whole or not at all; its digest."""
    raw = json.loads((peft_folder / CONFIG_FILE).read_text())
    canonical = canonical_config(raw, base_model=base.name)
    content = canonical_bytes(canonical)
    weights_digest = file_sha256(peft_folder / WEIGHTS_FILE)
    targets = canonical["target_modules"]
    manifest = Manifest(
        adapter=config.adapter,
        base_model=base.name,
        base_digest=base.digest,
        tokenizer_digest=base.tokenizer_digest,
        chat_template_digest=base.chat_template_digest,
        rank=canonical["r"],
        alpha=canonical["lora_alpha"],
        target_modules=(targets,) if isinstance(targets, str) else tuple(targets),
        datasets=datasets,
        recipe=config.hyperparameters(),
        versions={"python": platform.python_version(), **_versions()},
        device=device,
        git_revision=_git_revision(),
        metrics=metrics,
        wall_s=round(wall_s, 1),
        tokens=tokens,
        peak_memory_bytes=peak_memory_bytes,
        parent=config.parent,
        files={CONFIG_FILE: hashlib.sha256(content).hexdigest(), WEIGHTS_FILE: weights_digest},
    )
    _write(bundle, peft_folder / WEIGHTS_FILE, content, manifest_bytes(manifest))
    return bundle_digest(content, weights_digest)


def _write(bundle: Path, weights: Path, config: bytes, manifest: bytes) -> None:
    temporary = bundle.with_name(f".{bundle.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    shutil.copyfile(weights, temporary / WEIGHTS_FILE)
    (temporary / CONFIG_FILE).write_bytes(config)
    (temporary / MANIFEST_FILE).write_bytes(manifest)
    fsync_tree(temporary)
    temporary.rename(bundle)
    fsync(bundle.parent)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """Revision of the source that trained, when it runs from a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def file_sha256(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
