"""The trainer's process around a training of a few lines: signals, and a reader that goes away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The real main; only the recipe is another.
SCRIPT = """
import itertools, sys
import trainer.run as process
from trainer.models import Progress

def run(config, output, on_progress):
    for step in itertools.count():
        on_progress(Progress(f"step {step}"))
        if step > int(sys.argv[1]):
            return on_progress(Progress("deaf")) or work()

def work():
    while True:
        pass

process.run = run
process.ensure_environment = lambda *arguments, **named: None
sys.exit(process.main(["sft", "--json", "--set", "adapter=a", "--set", "dataset=d.jsonl", "--output", "out"]))
"""


def start(folder: Path, *, steps: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(steps)], cwd=folder, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def read_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended without {words!r}: {process.stderr.read()}")


def lose_reader(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None


def test_a_reader_that_goes_away_ends_it_without_a_word(tmp_path: Path) -> None:
    process = start(tmp_path, steps=10**9)
    read_until(process, "step 3")

    lose_reader(process)
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (143, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_after_its_reader_went_away_it_leaves_no_traceback(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, steps=1)
    read_until(process, "deaf")
    lose_reader(process)

    process.send_signal(number)
    _, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (143, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_say_once_that_it_stopped(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, steps=1)
    read_until(process, "deaf")

    for _ in range(5):
        process.send_signal(number)
    out, err = process.communicate(timeout=60)

    assert out.count("goes on from the last checkpoint") == 1
    assert (process.returncode, err) == (143, "")
