"""`turnout train` around a trainer that is a script of a few lines, found first on the path."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
DONE = {"bundle": "out", "digest": "a" * 64, "steps": 4, "tokens": 100, "metrics": {"valid_loss": 0.5}}
LOG = ".out.trainer.log"
STEPS = """
import json, sys
print("a library says hello")
print("downloading the moon", file=sys.stderr)
for step in (1, 2, 3, 4):
    numbers = {"step": step, "total_steps": 4, "train_loss": 1 / step}
    print(json.dumps({"message": f"step {step} of 4", "level": "info", "numbers": numbers}), flush=True)
"""
SUCCEEDS = STEPS + f"print(json.dumps({{'trained': {DONE!r}}}))"
CRASHES = STEPS + "sys.exit('CUDA is on fire')"
REFUSES = 'import json, sys\nprint(json.dumps({"message": "rank: must be positive [bad_config]", "level": "error"}))\nsys.exit(2)'
SLEEPS = STEPS + "import time, pathlib, os\npathlib.Path('pid').write_text(str(os.getpid()))\ntime.sleep(600)"


def start(folder: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    (folder / "trainer").mkdir()
    (folder / "trainer" / "__init__.py").touch()
    (folder / "trainer" / "run.py").write_text(script)
    argv = [sys.executable, "-m", "gateway.cli", "train", "sft", "--output", "out", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "TERM": "dumb"}
    return subprocess.Popen(
        argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_shows_steps_and_ends_with_what_to_do_next(tmp_path: Path) -> None:
    out, err = (process := start(tmp_path, SUCCEEDS)).communicate(timeout=60)

    assert process.returncode == 0, err
    assert "step 4 of 4" in out
    assert "turnout publish out" in out
    assert "valid_loss 0.5" in out
    assert not (tmp_path / LOG).exists()


@pytest.mark.parametrize("script", [SUCCEEDS, CRASHES, REFUSES])
def test_what_lies_beside_the_bundle_is_the_users(tmp_path: Path, script: str) -> None:
    """`turnout train ... > out.log` is what people type."""
    mine = {name: f"my {name}" for name in ("out.log", "out.txt", "out.json", "trainer.log")}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)

    start(tmp_path, script).communicate(timeout=60)

    assert {name: (tmp_path / name).read_text() for name in mine} == mine


def test_json_is_one_document(tmp_path: Path) -> None:
    out, err = (process := start(tmp_path, SUCCEEDS, "--json")).communicate(timeout=60)

    assert process.returncode == 0, err
    assert json.loads(out) == DONE


def test_a_crash_shows_the_end_of_the_log(tmp_path: Path) -> None:
    _, err = (process := start(tmp_path, CRASHES)).communicate(timeout=60)

    assert process.returncode == 1
    assert "CUDA is on fire" in err
    assert "(training_failed)" in err
    assert (tmp_path / LOG).is_file()


def test_a_wrong_config_is_wrong_usage(tmp_path: Path) -> None:
    out, err = (process := start(tmp_path, REFUSES)).communicate(timeout=60)

    assert process.returncode == 2
    assert "rank: must be positive [bad_config]" in out
    assert err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_leaves_no_trainer_behind(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, SLEEPS)
    pid = wait_for_pid(tmp_path / "pid")
    trainer = psutil.Process(pid)

    process.send_signal(number)
    process.communicate(timeout=60)

    psutil.wait_procs([trainer], timeout=10)
    assert not trainer.is_running()


# One operation that hears no signal until the file `go` is there, and then the last word.
HARD_OF_HEARING = """
import json, os, pathlib, signal, sys, time
def stop(number, frame):
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    print(json.dumps({"message": "my last word", "level": "warn"}), flush=True)
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
pathlib.Path("pid").write_text(str(os.getpid()))
while not pathlib.Path("go").exists():
    time.sleep(0.02)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_trainer_end_its_operation_and_hears_its_last_word(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, HARD_OF_HEARING)
    trainer = psutil.Process(wait_for_pid(tmp_path / "pid"))

    process.send_signal(number)
    assert process.stderr is not None
    stopping = process.stderr.readline()
    assert trainer.is_running()
    (tmp_path / "go").touch()
    out, err = process.communicate(timeout=60)

    assert "Ctrl-C again ends it at once" in stopping
    assert "my last word" in out
    assert "goes on from the last complete checkpoint" in err
    assert process.returncode == 130
    assert not trainer.is_running()
    assert (tmp_path / LOG).read_text() == ""


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_trainer_at_once(tmp_path: Path, second: signal.Signals) -> None:
    process = start(tmp_path, HARD_OF_HEARING)
    trainer = psutil.Process(wait_for_pid(tmp_path / "pid"))

    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    process.stderr.readline()
    process.send_signal(second)
    _, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "Stopped" in err
    assert not trainer.is_running()


def wait_for_pid(path: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text():
            return int(path.read_text())
        time.sleep(0.02)
    pytest.fail("the trainer did not start")
