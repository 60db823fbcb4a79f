"""The reference of a verified version is taken over whole, and nothing else is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.jobs.verification import install_reference

DIGEST = "d" * 64


def a_reference(directory: Path, **fields: object) -> Path:
    directory.mkdir()
    found = {"digest": DIGEST, "prompts": [{"token_ids": [1]}]} | fields
    (directory / "reference.json").write_text(json.dumps(found))
    return directory


def test_what_a_killed_controller_left_half_written_is_removed(tmp_path: Path) -> None:
    references = tmp_path / "references"
    references.mkdir()
    (references / f"{DIGEST}.json.999999999-ab.tmp").write_text("{")

    installed = install_reference(a_reference(tmp_path / "job"), references, DIGEST)

    assert list(references.iterdir()) == [installed]


@pytest.mark.parametrize("fields", [{"digest": "e" * 64}, {"prompts": []}])
def test_a_reference_of_something_else_is_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    references = tmp_path / "references"
    references.mkdir()

    with pytest.raises(ValueError, match="not about"):
        install_reference(a_reference(tmp_path / "job", **fields), references, DIGEST)

    assert list(references.iterdir()) == []
