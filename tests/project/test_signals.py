"""A run that a shell put into the background: it ignores SIGINT, and the programs under test must not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHILD = "import signal, sys; sys.exit(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
RUN = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {{}}import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {CHILD!r}]))"


def child_ignores(first: str) -> bool:
    done = subprocess.run([sys.executable, "-c", RUN.format(first)], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 1


def test_programs_under_test_hear_an_interrupt_though_the_run_does_not() -> None:
    assert not child_ignores("import tests.conftest; ")


def test_without_the_conftest_they_would_not() -> None:
    assert child_ignores("")
