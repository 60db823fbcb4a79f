"""What is installed is whole: a wheel carries every file of the packages, data as well as code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gateway", "trainer", "evals", "deploy")
BUILT_FROM = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """What git knows below the packages and still lies there."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git here: which files belong to the project is not known")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", *BUILT_FROM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def installed(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Files of a wheel that is built from a copy, because a build leaves its products beside the sources."""
    copy, wheels = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheels")
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, copy / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "-q", "-w", str(wheels), "."],
        cwd=copy, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("turnout-*.whl")
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_a_wheel_carries_every_file_of_the_packages(tracked: list[str], installed: set[str]) -> None:
    expected = {name for name in tracked if name.startswith(tuple(f"{package}/" for package in PACKAGES))}

    assert len(expected) > 100
    assert sorted(expected - installed) == [], "name the file's kind under [tool.setuptools.package-data]"


def test_a_wheel_carries_nothing_else_at_its_top(installed: set[str]) -> None:
    tops = {name.partition("/")[0] for name in installed}

    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
