"""Rules of the tree: what a reader finds in every folder, and what must not stand anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".venv", "build", "dist", ".git", "__pycache__", ".mypy_cache", ".ruff_cache", ".hypothesis"}
SKIPPED |= {".import_linter_cache", ".pytest_cache", "node_modules"}
HERE = Path(__file__).resolve()
# What betrays one machine or the making of the project. Spelt so that this file does not find itself.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.-])/(?:work|root|home/\w+|Users/\w+)/(?!\.\.\.)[\w.]"),
    "a number of an issue": re.compile(r"\b(?:this |the )?issues? #?\d+\b", re.IGNORECASE),
    "a host of packages that only some can reach": re.compile(
        r"https?://\S*(?:artifactory|nexus|mirror|proxy)\S*", re.IGNORECASE
    ),
    "a merge that was not finished": re.compile(r"^(?:<{7}|>{7}) ", re.MULTILINE),
    "work that was not done": re.compile(r"\b(?:TODO|FIXME|XXX)\b"),
}


def files() -> Iterator[Path]:
    """Every text file of the project."""
    pending = [ROOT]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            if path.name in SKIPPED or path.name.endswith(".egg-info"):
                continue
            if path.is_dir():
                pending.append(path)
            elif path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".sh", ".json", ".mako", ""}:
                yield path


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_forbidden_stands_anywhere(what: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, hit.start()) + 1}: {hit.group()!r}"
        for path in files()
        if path != HERE
        for text in [path.read_text(errors="replace")]
        for hit in FORBIDDEN[what].finditer(text)
    ]

    assert found == [], what


def test_every_folder_with_code_says_what_it_is_for() -> None:
    folders = {path.parent for path in files() if path.suffix == ".py" and path.parent != ROOT}

    silent = [
        str(folder.relative_to(ROOT))
        for folder in sorted(folders)
        if not (folder / "README.md").is_file() and not _docstring(folder / "__init__.py") and folder.name != "versions"
    ]

    assert [name for name in silent if name not in ("docs", ".ci")] == []


def _docstring(path: Path) -> bool:
    return path.is_file() and path.read_text().lstrip().startswith('"""')


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in files()
        if path.suffix == ".py" and path.stat().st_size and not _docstring(path)
        and path.relative_to(ROOT).parts[0] in ("trainer", "evals", "deploy", "gateway")
        and "versions" not in path.parts
    ]  # fmt: skip

    assert silent == []


def test_the_top_level_is_what_the_layout_says() -> None:
    allowed = {
        "pyproject.toml", "README.md", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", ".gitignore",
        "gateway", "trainer", "evals", "deploy", "tests", "requirements", "docs", ".ci",
    }  # fmt: skip

    found = {path.relative_to(ROOT).parts[0] for path in files()}

    assert found <= allowed


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()

    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply the Apache License" in text
