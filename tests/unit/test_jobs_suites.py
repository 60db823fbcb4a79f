"""Suites are folders: found by name, identified by their bytes, registered by copy."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gateway.errors import Conflict, Invalid, NotFound, Refused, TooLarge
from gateway.jobs import suites as module
from gateway.jobs.suites import Suites, copy_suite, suite_digest
from gateway.settings import Settings


def a_suite(folder: Path, text: str = "name: emails\n") -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "suite.yaml").write_text(text)
    (folder / "data" / "items.jsonl").write_text('{"a": 1}\n')
    return folder


@pytest.fixture
def suites(tmp_path: Path) -> Suites:
    found = Settings(home=tmp_path / "home")
    found.prepare_directories()
    a_suite(tmp_path / "shipped" / "general")
    return Suites(found, shipped=tmp_path / "shipped")


def test_the_digest_is_over_sorted_paths_and_bytes(tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "emails")

    item, yaml = (hashlib.sha256(text.encode()).hexdigest() for text in ('{"a": 1}\n', "name: emails\n"))
    expected = hashlib.sha256(f"data/items.jsonl\x00{item}\nsuite.yaml\x00{yaml}\n".encode()).hexdigest()

    assert suite_digest(folder) == expected


def test_hidden_files_and_caches_are_no_part_of_it(tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "emails")
    before = suite_digest(folder)

    (folder / ".notes").write_text("x")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_text("x")

    assert suite_digest(folder) == before
    copy_suite(folder, tmp_path / "copy")
    assert suite_digest(tmp_path / "copy") == before
    assert not (tmp_path / "copy" / ".notes").exists()


def test_registers_a_copy_and_finds_it(suites: Suites, tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "emails")

    registered = suites.register(folder)
    (folder / "suite.yaml").write_text("changed")

    assert [(suite.name, suite.source) for suite in suites.list()] == [("emails", "registered"), ("general", "shipped")]
    assert suites.find("emails") == registered
    assert registered.files == 2
    assert suite_digest(registered.path) == registered.digest


def test_the_same_suite_again_changes_nothing(suites: Suites, tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "emails")

    assert suites.register(folder) == suites.register(folder)


def test_another_suite_of_that_name_needs_a_word(suites: Suites, tmp_path: Path) -> None:
    first = suites.register(a_suite(tmp_path / "emails"))
    other = a_suite(tmp_path / "other" / "emails", "name: emails\nmore: true\n")

    with pytest.raises(Conflict) as refused:
        suites.register(other)
    assert refused.value.code == "suite_exists"
    assert suites.find("emails") == first

    replaced = suites.register(other, replace=True)
    assert replaced.digest == suite_digest(other) == suites.find("emails").digest != first.digest


def test_a_registered_suite_hides_the_shipped_one(suites: Suites, tmp_path: Path) -> None:
    registered = suites.register(a_suite(tmp_path / "general", "name: general\nmine: true\n"))

    assert suites.find("general") == registered
    assert [suite.source for suite in suites.list()] == ["registered"]


@pytest.mark.parametrize("name", ["nope", "../general", "general/data", "", ".", "GENERAL"])
def test_an_unknown_name_is_not_found(suites: Suites, name: str) -> None:
    with pytest.raises(NotFound) as refused:
        suites.find(name)
    assert refused.value.code == "suite_not_found"


def test_links_are_refused(suites: Suites, tmp_path: Path) -> None:
    folder = a_suite(tmp_path / "emails")
    (folder / "data" / "passwd").symlink_to("/etc/passwd")

    with pytest.raises(Refused) as refused:
        suites.register(folder)

    assert refused.value.code == "suite_has_link"
    assert "data/passwd of suite 'emails'" in refused.value.message
    assert str(tmp_path) not in refused.value.message
    assert not list((tmp_path / "home" / "suites").iterdir())


def test_a_folder_that_is_a_link_is_no_suite(suites: Suites, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(a_suite(tmp_path / "emails"))

    with pytest.raises(Invalid) as refused:
        suites.register(tmp_path / "alias")
    assert refused.value.code == "bad_suite"


@pytest.mark.parametrize(("limit", "value"), [("MAX_FILES", 1), ("MAX_BYTES", 10)])
def test_caps(suites: Suites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    monkeypatch.setattr(module, limit, value)

    with pytest.raises(TooLarge) as refused:
        suites.register(a_suite(tmp_path / "emails"))
    assert refused.value.code == "suite_too_large"


@pytest.mark.parametrize("name", ["Bad Name", "under_score", "-x"])
def test_a_folder_whose_name_is_no_name(suites: Suites, tmp_path: Path, name: str) -> None:
    with pytest.raises(Invalid) as refused:
        suites.register(a_suite(tmp_path / name))
    assert refused.value.code == "bad_name"


def test_a_folder_without_a_suite_file(suites: Suites, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(Invalid) as refused:
        suites.register(tmp_path / "empty")
    assert refused.value.code == "bad_suite"
