"""Every long test is in one area of `make test-long`, and a wrong area is an error that names the right ones."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.long.areas import AREAS, seeds

ROOT = Path(__file__).resolve().parents[2]


def collected() -> list[str]:
    """Files with long tests, as pytest finds them."""
    marked = [str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.long" in path.read_text()]
    argv = [sys.executable, "-m", "pytest", *marked, "-m", "long", "--collect-only", "-q", "-n", "0"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    return sorted({line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line})


def test_every_long_test_is_in_exactly_one_area() -> None:
    times = Counter(file for files in AREAS.values() for file in files)

    assert sorted(times) == collected()
    assert set(times.values()) == {1}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make would do; nothing is done."""
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def areas(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.long.areas", *arguments]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)


def test_an_unknown_area_is_an_error_that_lists_them() -> None:
    found = areas("rolouts")

    assert found.returncode != 0
    assert "AREA=rolouts is no area" in found.stderr
    assert all(name in found.stderr for name in AREAS)


def test_no_area_is_all_of_them() -> None:
    every = areas("").stdout.split()

    assert sorted(every) == sorted(file for files in AREAS.values() for file in files)


@pytest.mark.parametrize(("arguments", "installs"), [((), True), (("AREA=framing",), True), (("AREA=soak",), False)])
def test_fronts_are_installed_only_where_they_are_used(arguments: tuple[str, ...], installs: bool) -> None:
    assert ("install_fronts" in make("test-long", *arguments).stdout) == installs


def test_make_help_lists_the_areas() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)

    [line] = [line for line in done.stdout.splitlines() if line.startswith("test-long")]
    assert all(name in line for name in AREAS)


@pytest.mark.parametrize("given", ["0", "many", "-1", "1.5"])
def test_seeds_that_are_no_number_are_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("TURNOUT_SIMULATION_SEEDS", given)

    with pytest.raises(ValueError, match="SEEDS is"):
        seeds(20)


def test_seeds_are_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNOUT_SIMULATION_SEEDS", "7")
    assert seeds(20) == 7
    monkeypatch.setenv("TURNOUT_SIMULATION_SEEDS", "")
    assert seeds(20) == 20
