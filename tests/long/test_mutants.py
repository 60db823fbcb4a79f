"""Faults planted in guards, one at a time: the tests that people run notice them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_faults_in_guards_are_noticed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants.run"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
