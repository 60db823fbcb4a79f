"""Manifest, canonical config and base family: what their digests depend on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from gateway.errors import Invalid, Refused
from gateway.registry.base_family import BaseFamily, load_base_family
from gateway.registry.manifest import (
    MAX_STRUCTURE,
    Manifest,
    bundle_digest,
    canonical_bytes,
    canonical_config,
    manifest_bytes,
    manifest_digest,
    parse_manifest,
)
from gateway.registry.tensors import read_float32, read_header
from tests.corpus import make_base, write_safetensors


def a_manifest(**fields: object) -> Manifest:
    return Manifest.model_validate(
        {"adapter": "support", "base_model": "tiny", "rank": 8, "alpha": 16, "target_modules": ["q_proj"], **fields}
    )


def test_a_stored_manifest_reads_back_as_itself() -> None:
    manifest = a_manifest(
        datasets=[{"role": "train", "digest": "a" * 64, "rows": 3, "tokens": 9}], metrics={"loss": 0.5}, parent="support@1",
        recipe={"lr": 1e-3, "nested": {"b": [1, 2], "a": None}}, notes="kept though unknown",
    )  # fmt: skip

    again = parse_manifest(manifest_bytes(manifest))

    assert again == manifest
    assert manifest_digest(again) == manifest_digest(manifest)
    assert json.loads(manifest_bytes(manifest))["notes"] == "kept though unknown"


def test_the_manifests_digest_does_not_depend_on_the_order_of_keys() -> None:
    one, two = a_manifest(recipe={"a": 1, "b": 2}), a_manifest(recipe={"b": 2, "a": 1})

    assert manifest_digest(one) == manifest_digest(two)
    assert manifest_digest(one) != manifest_digest(a_manifest(recipe={"a": 1, "b": 3}))


def test_the_canonical_config_is_its_own_canonical_form() -> None:
    config = canonical_config(
        {
            "r": 8,
            "lora_alpha": 16.0,
            "target_modules": ["v", "q", "q"],
            "base_model_name_or_path": "/a/b/base/",
            "auto_mapping": {"x": 1},
        }
    )

    assert config["target_modules"] == ["q", "v"]
    assert (config["base_model_name_or_path"], config["lora_alpha"]) == ("base", 16)
    assert canonical_bytes(canonical_config(config)) == canonical_bytes(config)
    assert "auto_mapping" not in config


def test_the_bundles_digest_covers_config_and_weights() -> None:
    digests = {bundle_digest(config, weights * 64) for config in (b"a", b"b") for weights in ("1", "2")}

    assert len(digests) == 4


@pytest.fixture
def base(tmp_path: Path) -> BaseFamily:
    return make_base(tmp_path / "base")


def changed(base: BaseFamily, tmp_path: Path, file: str, **fields: object) -> BaseFamily:
    folder = tmp_path / "changed"
    shutil.copytree(base.path, folder)
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **fields}))
    return load_base_family(base.name, folder)


def test_a_family_knows_its_linear_layers(base: BaseFamily) -> None:
    assert base.module_shapes["model.layers.1.mlp.down_proj"] == (32, 64)
    assert len(base.module_shapes) == 14
    assert not any("embed" in module or "norm" in module for module in base.module_shapes)
    assert base.vocab_size == 64


def test_the_familys_digest_ignores_who_saved_it(base: BaseFamily, tmp_path: Path) -> None:
    assert changed(base, tmp_path, "config.json", transformers_version="9.9", _name_or_path="x").digest == base.digest


def test_the_familys_digest_ignores_how_weights_are_split(base: BaseFamily, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    shutil.copytree(base.path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    descriptor = os.open(base.path / "model.safetensors", os.O_RDONLY)
    tensors = {tensor.name: ("BF16", read_float32(descriptor, tensor)) for tensor in read_header(descriptor)}
    os.close(descriptor)
    half = len(tensors) // 2
    for part, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        write_safetensors(folder / f"model-{part}.safetensors", {name: tensors[name] for name in names})

    assert load_base_family(base.name, folder).digest == base.digest


@pytest.mark.parametrize(
    ("file", "fields"),
    [("config.json", {"rms_norm_eps": 1e-6}), ("tokenizer.json", {"normalizer": {"type": "Lowercase"}})],
)
def test_the_familys_digest_changes_with_what_matters(
    base: BaseFamily, tmp_path: Path, file: str, fields: dict[str, object]
) -> None:
    assert changed(base, tmp_path, file, **fields).digest != base.digest


def test_the_familys_digest_changes_with_template_and_weights(base: BaseFamily, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", seed=1)
    assert other.digest != base.digest
    assert other.tokenizer_digest == base.tokenizer_digest

    (base.path / "chat_template.jinja").write_text("{{ other }}")

    again = load_base_family(base.name, base.path)
    assert again.chat_template_digest != base.chat_template_digest
    assert again.digest != base.digest


def test_a_folder_without_weights_is_named_with_its_remedy(base: BaseFamily) -> None:
    (base.path / "model.safetensors").unlink()

    with pytest.raises(Invalid, match=r"model.safetensors.*make base-model") as caught:
        load_base_family("tiny", base.path)

    assert caught.value.code == "bad_base_model"


def test_damaged_base_weights_are_an_error_of_the_server(base: BaseFamily) -> None:
    (base.path / "model.safetensors").write_bytes(np.zeros(100, np.uint8).tobytes())

    with pytest.raises(Invalid) as caught:
        load_base_family("tiny", base.path)

    assert caught.value.code == "bad_base_model"


def test_a_manifest_with_more_structure_than_any_has_is_refused_before_it_is_parsed() -> None:
    content = b"{" + b",".join(b'"%d":0' % number for number in range(MAX_STRUCTURE)) + b"}"

    with pytest.raises(Refused) as caught:
        parse_manifest(content)

    assert caught.value.code == "bad_manifest"
    assert f"{MAX_STRUCTURE:,}" in caught.value.message


def test_a_wrong_manifest_is_refused_in_a_few_words() -> None:
    fields = {"x" * 10_000: 1, "datasets": [["y" * 10_000] * 100]}
    with pytest.raises(Refused) as caught:
        parse_manifest(json.dumps({**a_manifest().model_dump(mode="json"), **fields}).encode())

    assert len(caught.value.message) < 500
