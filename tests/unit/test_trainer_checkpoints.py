"""Only whole checkpoints of the very same training count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.checkpoints import MARKER, last_complete, mark_complete, remove_incomplete

FILES = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json")


def a_checkpoint(directory: Path, step: int, *, fingerprint: str = "same", complete: bool = True) -> Path:
    folder = directory / f"checkpoint-{step}"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes(name.encode() * step)
    if complete:
        mark_complete(folder, fingerprint=fingerprint, elapsed_s=step / 2)
    return folder


def test_the_newest_whole_one_is_found(tmp_path: Path) -> None:
    a_checkpoint(tmp_path, 9)
    newest = a_checkpoint(tmp_path, 10)

    found = last_complete(tmp_path, fingerprint="same")

    assert found is not None
    assert (found.path, found.step, found.elapsed_s) == (newest, 10, 5.0)


def test_a_folder_without_a_marker_is_no_checkpoint(tmp_path: Path) -> None:
    a_checkpoint(tmp_path, 3)
    a_checkpoint(tmp_path, 6, complete=False)
    (tmp_path / "checkpoint-9").mkdir()

    found = last_complete(tmp_path, fingerprint="same")

    assert found is not None
    assert found.step == 3


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_or_gone_makes_it_torn(tmp_path: Path, name: str) -> None:
    folder = a_checkpoint(tmp_path, 4)
    content = (folder / name).read_bytes()

    (folder / name).write_bytes(content[:-1])
    assert last_complete(tmp_path, fingerprint="same") is None

    (folder / name).unlink()
    assert last_complete(tmp_path, fingerprint="same") is None

    (folder / name).write_bytes(content)
    assert last_complete(tmp_path, fingerprint="same") is not None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", json.dumps({"files": [], "fingerprint": "same", "elapsed_s": 1})]
)
def test_a_marker_that_cannot_be_read_does_not_count(tmp_path: Path, text: str) -> None:
    folder = a_checkpoint(tmp_path, 4)
    (folder / MARKER).write_text(text)

    assert last_complete(tmp_path, fingerprint="same") is None


def test_another_trainings_checkpoint_does_not_count(tmp_path: Path) -> None:
    a_checkpoint(tmp_path, 4, fingerprint="other")

    assert last_complete(tmp_path, fingerprint="same") is None


def test_what_cannot_be_resumed_from_is_removed(tmp_path: Path) -> None:
    a_checkpoint(tmp_path, 2)
    a_checkpoint(tmp_path, 4, complete=False)
    a_checkpoint(tmp_path, 6, fingerprint="other")
    (tmp_path / "final").mkdir()

    gone = remove_incomplete(tmp_path, fingerprint="same")

    assert gone == ["checkpoint-4", "checkpoint-6"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "final"]


def test_no_directory_holds_no_checkpoint(tmp_path: Path) -> None:
    assert last_complete(tmp_path / "nowhere", fingerprint="same") is None
