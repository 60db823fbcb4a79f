"""kill -9 at every step of a publish: nothing half-published, and publishing again works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def outcomes(directory: Path, *mode: str) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.crash_publish", str(directory), *mode],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.invariant(1)
@pytest.mark.invariant(10)
def test_killed_at_any_step_a_publish_is_whole_or_not_at_all(tmp_path: Path) -> None:
    found = outcomes(tmp_path)

    assert len(found) > 20
    assert all(each["killed"] for each in found)
    assert [each for each in found if each["faults"]] == []


@pytest.mark.mutant(10)
def test_mutant_that_writes_in_place_leaves_half_a_version(tmp_path: Path) -> None:
    found = outcomes(tmp_path, "unsafe")

    assert any("digest_mismatch" in fault for each in found for fault in each["faults"])
