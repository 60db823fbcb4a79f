"""Attempts of a fine-tuning job as the controller starts them: a directory, a spec, a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gateway.jobs.models import JobResult, ProgressLine
from trainer.environment import training_environment

PATIENCE_S = 300.0


def an_attempt(job: Path, number: int, config: dict[str, Any]) -> Path:
    directory = job / str(number)
    directory.mkdir()
    (directory / "spec.json").write_text(json.dumps({"token": f"token-{number}", "config": config}))
    return directory


def start(attempt: Path) -> subprocess.Popen[bytes]:
    with (attempt / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "trainer.job", str(attempt)],
            env={"PATH": os.environ["PATH"], "HOME": str(attempt), **training_environment(1)},
            stdout=log,
            stderr=log,
        )


def run(attempt: Path) -> int:
    process = start(attempt)
    return process.wait(timeout=PATIENCE_S)


def run_all(*attempts: Path) -> int:
    """One after the other in one process: importing the libraries takes longer than short attempts do."""
    program = "import sys; from trainer.job import main; sys.exit(max(main([one]) for one in sys.argv[1:]))"
    with (attempts[0] / "log.txt").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, attempts)],
            env={"PATH": os.environ["PATH"], "HOME": str(attempts[0]), **training_environment(1)},
            stdout=log, stderr=log, timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    return done.returncode


def result_of(attempt: Path) -> JobResult:
    assert (attempt / "result.json").exists(), (attempt / "log.txt").read_text()[-2000:]
    return JobResult.model_validate_json((attempt / "result.json").read_text())


def told(attempt: Path) -> list[ProgressLine]:
    path = attempt / "progress.jsonl"
    text = path.read_text() if path.exists() else ""
    return [ProgressLine.model_validate_json(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for_step(attempt: Path, process: subprocess.Popen[bytes], step: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not any(line.data and line.data.get("step", 0) >= step for line in told(attempt)):
        assert process.poll() is None, (attempt / "log.txt").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
