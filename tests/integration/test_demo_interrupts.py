"""Ctrl-C in the demo, with the real `turnout train` around a trainer of a few lines: what is said is true."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from deploy.demo.stopping import is_running, kill_all

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
# The demo's own main, with one step in place of all.
DRIVER = """
import os, sys
from pathlib import Path
from deploy.demo import run
from deploy.demo.commands import Commands, Server

def step(console, interrupts, *, seed, keep):
    commands = Commands(Path.cwd(), dict(os.environ), console, interrupts)
    {step}

run.run = step
sys.exit(run.main())
"""
TRAIN = DRIVER.format(step='return commands.turnout("train", "sft", "--output", "out")')
SERVE = DRIVER.format(
    step="""
    run.WORK = Path.cwd()
    with run.serving(commands, port=1, keep=False) as server:
        commands.turnout("status")
    return 0"""
)
# One operation that hears no signal until the file `go` is there, as a long one of torch does.
OPERATION = """
import json, os, pathlib, signal, subprocess, sys, time
def stop(number, frame):
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    print(json.dumps({"message": "stopped", "level": "warn"}), flush=True)
    sys.exit(143)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
pathlib.Path("pids.new").write_text(f"{os.getpid()} {helper.pid}")
pathlib.Path("pids.new").rename("pids")
while not pathlib.Path("go").exists():
    time.sleep(0.02)
helper.kill()
helper.wait()
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
time.sleep(600)
"""


@dataclass
class Running:
    """The demo, and the stand-ins below it."""

    folder: Path
    process: subprocess.Popen[str]
    stand_ins: list[psutil.Process] = field(default_factory=list)

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    def until(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.said}"
            time.sleep(0.02)

    def end(self) -> int:
        """The exit code; what the demo started must be gone by then, not soon after."""
        code = self.process.wait(PATIENCE_S)
        left = [process for process in self.stand_ins if is_running(process)]
        assert left == []
        return code


@contextmanager
def a_demo(folder: Path, driver: str, stand_in: str, *, package: str) -> Iterator[Running]:
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    (folder / package / ("run.py" if package == "trainer" else "cli.py")).write_text(stand_in)
    (folder / "driver").mkdir()
    (folder / "driver" / "demo.py").write_text(driver)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "COLUMNS": "300"}
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, str(folder / "driver" / "demo.py")], cwd=folder, env=environment, stdout=said,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
    running = Running(folder, process)
    try:
        running.until((folder / "pids").exists, "the stand-in runs")
        running.stand_ins += [psutil.Process(int(pid)) for pid in (folder / "pids").read_text().split()]
        yield running
    finally:
        for stand_in_process in [*running.stand_ins, psutil.Process(process.pid)] if process.poll() is None else []:
            stand_in_process.kill()
        process.wait()


def test_one_ctrl_c_waits_for_the_trainer_and_says_so(tmp_path: Path) -> None:
    with a_demo(tmp_path, TRAIN, OPERATION, package="trainer") as demo:
        os.killpg(demo.process.pid, signal.SIGINT)  # as a terminal does
        demo.until(lambda: "waiting for" in demo.said, "it says what it waits for")
        assert f"{demo.stand_ins[0].pid} " in demo.said
        assert "nothing is left running" not in demo.said

        (tmp_path / "go").touch()

        assert demo.end() == 130
    assert "Interrupted; nothing is left running." in demo.said
    assert "Traceback" not in demo.said + (tmp_path / ".out.trainer.log").read_text()


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGINT),
    ],
    ids=lambda numbers: "+".join(number.name for number in numbers),
)
def test_another_one_ends_everything_at_once_and_it_is_gone_when_it_says_so(
    tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    with a_demo(tmp_path, TRAIN, OPERATION, package="trainer") as demo:
        os.killpg(demo.process.pid, numbers[0])
        demo.until(lambda: "Stopping" in demo.said, "it heard the first")
        for number in numbers[1:]:
            os.killpg(demo.process.pid, number)

        assert demo.end() == 130
    assert "Killing" in demo.said
    assert demo.said.rstrip().endswith("Interrupted; nothing is left running.")
    assert "Traceback" not in demo.said + (tmp_path / ".out.trainer.log").read_text()


HEADLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
print("up", flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_first_thread_alone_has_ended_still_runs(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HEADLESS], stdout=subprocess.PIPE, text=True)
    seen = psutil.Process(process.pid)
    deadline = time.monotonic() + PATIENCE_S
    try:
        assert process.stdout is not None
        process.stdout.readline()
        while seen.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.01)

        assert is_running(seen)
    finally:
        process.kill()
    assert kill_all(lambda: {seen}) == []
    assert not is_running(seen)
    process.communicate()


# A server that hears no SIGTERM, with an engine in a session of its own, and a command that waits for it.
SERVER = """
import os, pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if sys.argv[1] == "serve":
    engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    pathlib.Path("engine").write_text(str(engine.pid))
    if pathlib.Path("dies").exists():
        sys.exit(3)
else:
    while not pathlib.Path("engine").exists():
        time.sleep(0.02)
    pathlib.Path("pids.new").write_text(f"{os.getpid()} " + pathlib.Path("engine").read_text())
    pathlib.Path("pids.new").rename("pids")
time.sleep(600)
"""


def test_a_server_that_does_not_stop_goes_with_what_it_started_when_asked_again(tmp_path: Path) -> None:
    with a_demo(tmp_path, SERVE, SERVER, package="gateway") as demo:
        os.killpg(demo.process.pid, signal.SIGINT)
        demo.until(lambda: "Stopping `turnout status`" in demo.said, "it heard the first")
        os.killpg(demo.process.pid, signal.SIGINT)

        assert demo.end() == 130
    assert demo.said.rstrip().endswith("Interrupted; nothing is left running.")


def test_a_command_that_waits_for_a_server_that_is_gone_is_ended(tmp_path: Path) -> None:
    (tmp_path / "dies").touch()
    with a_demo(tmp_path, SERVE, SERVER.replace("SIG_IGN", "SIG_DFL"), package="gateway") as demo:
        assert demo.end() == 1
    assert "`turnout serve` ended with 3" in demo.said
    assert "nothing is left running" in demo.said
