"""Files that are on the disk for good: what is flushed and in which order, and what is left when a step fails."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from evals.scores import Fingerprint, ScoreCache, ScoreSet
from gateway.durable import fsync_tree, put, remove_unfinished, write_new
from gateway.jobs.suites import Suites
from gateway.jobs.workdir import WorkDirectory
from gateway.keys import load_pepper
from gateway.settings import Settings
from tests.files import note_fsync
from trainer.checkpoints import mark_complete


@pytest.fixture
def flushes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was forced to the disk, in order."""
    return note_fsync(monkeypatch)


def named(flushes: list[Path]) -> list[str]:
    """Folders by name with a slash, files with how they were called then."""
    return [f"{path.name}/" if path.is_dir() else path.name for path in flushes]


def test_a_file_is_flushed_under_another_name_and_its_folder_after_it_has_its_own(
    tmp_path: Path, flushes: list[Path]
) -> None:
    put(tmp_path / "a.json", b"one")
    put(tmp_path / "a.json", b"two")

    assert [name.startswith("a.json.") and name.endswith(".tmp") for name in named(flushes)] == [True, False] * 2
    assert flushes[1] == flushes[3] == tmp_path
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"two"}


@pytest.mark.parametrize("broken", ["fsync", "rename"])
def test_when_a_step_fails_the_old_file_is_whole_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    put(tmp_path / "a.json", b"old")

    def fails(*_: object) -> None:
        raise OSError(28, "the disk is full")

    if broken == "fsync":
        monkeypatch.setattr(os, "fsync", fails)
    else:
        monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="the disk is full"):
        put(tmp_path / "a.json", b"new")

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"old"}


@pytest.mark.parametrize("mode", [0o600, 0o444])
def test_nobody_can_read_it_before_its_mode_is_set(tmp_path: Path, mode: int) -> None:
    put(tmp_path / "secret", b"x", mode=mode)

    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == mode


def test_a_new_file_replaces_none(tmp_path: Path) -> None:
    write_new(tmp_path / "a", b"one")

    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"


def test_what_the_dead_left_goes_and_what_the_living_write_stays(tmp_path: Path) -> None:
    dead, living = tmp_path / "a.json.999999999-ab.tmp", tmp_path / f"a.json.{os.getpid()}-ab.tmp"
    others = [tmp_path / name for name in ("b.json.999999999-ab.tmp", "a.json", "a.json.notes.tmp", "a.jsonx")]
    for path in (dead, living, *others):
        path.touch()

    remove_unfinished(tmp_path / "a.json")

    assert set(tmp_path.iterdir()) == {living, *others}


def test_a_tree_is_flushed_from_the_leaves_to_the_root(tmp_path: Path, flushes: list[Path]) -> None:
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "root" / "inner" / "leaf").touch()

    fsync_tree(tmp_path / "root")

    assert named(flushes) == ["leaf", "inner/", "root/"]


# ---- Who must be found again after the power went


def a_result(home: Path) -> None:
    WorkDirectory(home).finish("token", ok=True)


def a_pepper(home: Path) -> None:
    settings = Settings(home=home)
    settings.prepare_directories()
    load_pepper(settings)


def a_checkpoint(home: Path) -> None:
    (home / "weights").touch()
    mark_complete(home, fingerprint="f", elapsed_s=1.0)


def scores(home: Path) -> None:
    made = Fingerprint(backend="gateway", base_digest="b" * 64, engine="vllm", dtype="bfloat16", harness="lm-eval")
    ScoreCache(home).save(ScoreSet(target_digest="a" * 64, task="t", task_digest="b" * 64, fingerprint=made))


def a_suite(home: Path) -> None:
    folder = home / "mine" / "emails"
    folder.mkdir(parents=True)
    (folder / "suite.yaml").write_text("name: emails\n")
    settings = Settings(home=home / "home")
    settings.prepare_directories()
    Suites(settings, shipped=home / "none").register(folder)


@pytest.mark.parametrize("write", [a_result, a_pepper, a_checkpoint, scores, a_suite])
def test_the_folder_is_flushed_last(tmp_path: Path, flushes: list[Path], write: Callable[[Path], None]) -> None:
    write(tmp_path)

    assert len(flushes) > 1
    assert flushes[-1].is_dir()
