"""The trainer as processes: a job's entry, the command, kills and resumption, on a base that trains in seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.demo.data import DemoData, make_demo_data
from gateway.jobs.models import JobResult
from gateway.registry.manifest import bundle_digest, parse_manifest
from tests.tiny_base import make_tiny_base
from tests.trainer_jobs import PATIENCE_S, an_attempt, result_of, run, run_all, start, told, wait_for_step

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("default")]

STEPS = 60


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    """The demo's data, cut down: four passes over it."""
    found = make_demo_data(tmp_path_factory.mktemp("data"), 0)
    for path in vars(found).values():
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:60]))
    return found


@pytest.fixture(scope="module")
def finished(base: Path, data: DemoData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An attempt that nothing happened to."""
    attempt = an_attempt(tmp_path_factory.mktemp("job"), 1, settings(base, data))
    assert run(attempt) == 0
    return attempt


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> JobResult:
    """What the job's training gives when nothing happens to it."""
    return result_of(finished)


def settings(base: Path, data: DemoData, **changes: Any) -> dict[str, Any]:
    return {
        "adapter": "support", "base_model": str(base), "base_model_name": "tiny", "dataset": str(data.train),
        "validation": str(data.validation), "rank": 4, "batch_size": 4, "max_steps": STEPS, "checkpoint_every": 10,
        "dropout": 0.1, "threads": 1, **changes,
    }  # fmt: skip


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_a_job_leaves_its_bundle_then_its_result(undisturbed: JobResult) -> None:
    assert (undisturbed.ok, undisturbed.token) == (True, "token-1")
    assert undisturbed.data["bundle"] == "bundle"
    assert undisturbed.data["trained_tokens"] > 0
    assert {"train_loss", "valid_loss", "best_valid_loss", "steps"} <= set(undisturbed.data["metrics"])


def test_a_job_killed_in_the_middle_goes_on_and_gives_the_same_adapter(
    base: Path, data: DemoData, tmp_path: Path, undisturbed: JobResult, started: list[subprocess.Popen[bytes]]
) -> None:
    first = an_attempt(tmp_path, 1, settings(base, data))
    process = start(first)
    started.append(process)
    wait_for_step(first, process, 25)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (first / "result.json").exists()

    second = an_attempt(tmp_path, 2, settings(base, data))
    assert run(second) == 0

    assert any("going on from step" in line.message for line in told(second))
    steps = [line.data["step"] for line in told(second) if line.data and "train_loss" in line.data]
    assert min(steps) >= 20
    assert result_of(second).data["digest"] == undisturbed.data["digest"]
    assert result_of(second).data["metrics"] == undisturbed.data["metrics"]
    assert result_of(second).data["trained_tokens"] == undisturbed.data["trained_tokens"]
    assert not (tmp_path / "checkpoints").exists()


def test_sigterm_stops_a_job_at_once_without_a_result_and_the_next_attempt_goes_on(
    base: Path, data: DemoData, tmp_path: Path, undisturbed: JobResult, started: list[subprocess.Popen[bytes]]
) -> None:
    first = an_attempt(tmp_path, 1, settings(base, data))
    process = start(first)
    started.append(process)
    wait_for_step(first, process, 15)
    process.terminate()

    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert not (first / "result.json").exists()
    assert not (first / "bundle").exists()
    assert told(first)[-1].message.startswith("stopped on request")

    second = an_attempt(tmp_path, 2, settings(base, data))
    assert run(second) == 0
    assert result_of(second).data["digest"] == undisturbed.data["digest"]


def test_the_digest_told_is_that_of_the_bundle(finished: Path, undisturbed: JobResult) -> None:
    bundle = finished / "bundle"
    manifest = parse_manifest((bundle / "manifest.json").read_bytes())
    content = (bundle / "adapter_config.json").read_bytes()
    assert bundle_digest(content, manifest.files["adapter_model.safetensors"]) == undisturbed.data["digest"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bad_config": ({"learning_rte": 1}, "learning_rte is no setting"),
    "no_such_file": ({"dataset": "/nowhere/train.jsonl"}, "does not exist"),
    "bad_base_model": ({"base_model": "/nowhere/base"}, "/nowhere/base"),
    "bad_adapter": ({"init_from": "/nowhere/bundle"}, "/nowhere/bundle"),
}


@pytest.fixture(scope="module")
def refused(base: Path, data: DemoData, tmp_path_factory: pytest.TempPathFactory) -> dict[str, JobResult]:
    """What came of each, by its reason code."""
    made = {
        code: an_attempt(tmp_path_factory.mktemp(code), 1, settings(base, data, **changes))
        for code, (changes, _) in REFUSED.items()
    }
    assert run_all(*made.values()) == 0
    return {code: result_of(attempt) for code, attempt in made.items()}


@pytest.mark.parametrize("code", REFUSED)
def test_what_cannot_be_trained_is_a_result_with_a_reason(refused: dict[str, JobResult], code: str) -> None:
    result = refused[code]

    assert (result.ok, result.error_code, result.token) == (False, code, "token-1")
    assert REFUSED[code][1] in (result.error_message or "")


def command(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, started in the wrong environment."""
    return subprocess.run(
        [sys.executable, "-m", "trainer.run", *arguments, "--output", str(output)],
        env={"PATH": os.environ["PATH"], "HOME": str(output.parent)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def overrides(base: Path, data: DemoData) -> list[str]:
    values = settings(base, data, max_steps=3, threads=2)
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def test_the_command_trains_a_preset_and_tells_it_in_json(base: Path, data: DemoData, tmp_path: Path) -> None:
    done = command(tmp_path / "bundle", "sft", *overrides(base, data), "--json")

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert lines[-1]["trained"]["steps"] == 3
    assert {"message", "level", "numbers"} <= set(lines[0])
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".")) == ["bundle"]
    assert "cpu, 2 threads" in json.loads((tmp_path / "bundle" / "manifest.json").read_text())["device"]


def test_the_command_refuses_an_output_that_exists_and_an_unknown_setting(
    base: Path, data: DemoData, tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()

    taken = command(tmp_path / "bundle", "sft", *overrides(base, data))
    unknown = command(tmp_path / "other", "sft", "--set", "learning_rte=1")

    assert (taken.returncode, unknown.returncode) == (2, 2)
    assert "exists: name another, or remove it [output_exists]" in taken.stderr
    assert "learning_rte is no setting of the trainer" in unknown.stderr
    assert "Traceback" not in taken.stderr + unknown.stderr
