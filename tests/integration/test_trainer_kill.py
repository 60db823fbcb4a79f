"""A real training killed three times, at its worst moments, ends with the adapter of an undisturbed one."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.demo.data import make_demo_data
from gateway.registry.manifest import parse_manifest
from tests.tiny_base import REAL_BASE
from tests.trainer_jobs import PATIENCE_S, an_attempt, result_of, run, start, told, wait_for_step
from trainer.checkpoints import MARKER
from trainer.config import SFTConfig
from trainer.memory import estimate, read_shape

pytestmark = [pytest.mark.heavy, pytest.mark.long, pytest.mark.timeout(1800)]


def settings(data: Path) -> dict[str, Any]:
    return {
        "adapter": "support", "base_model": str(REAL_BASE), "dataset": str(data), "dropout": 0.05, "max_steps": 24,
        "checkpoint_every": 6, "threads": 1,
    }  # fmt: skip


def kill_while_saving(attempt: Path, step: int) -> None:
    """Kill between the first byte of a checkpoint and its marker."""
    process = start(attempt)
    folder = attempt.parent / "checkpoints" / f"checkpoint-{step}"
    deadline = time.monotonic() + PATIENCE_S
    try:
        while not folder.exists():
            assert process.poll() is None, (attempt / "log.txt").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / MARKER).exists()


def assert_estimate_holds(attempt: Path) -> None:
    """Memory was estimated before training, from the base's config and the longest row: high, and not absurdly so."""
    config = SFTConfig.model_validate(json.loads((attempt / "spec.json").read_text())["config"])
    manifest = parse_manifest((attempt / "bundle" / "manifest.json").read_bytes())
    longest = int(next(line.message for line in told(attempt) if "longest" in line.message).split()[-2])
    expected = estimate(config, read_shape(REAL_BASE, precision_bytes=2), longest=longest).total
    assert manifest.peak_memory_bytes is not None
    assert 0.5 * expected <= manifest.peak_memory_bytes <= expected


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    config = settings(make_demo_data(tmp_path / "data", 0).train)
    (tmp_path / "calm").mkdir()
    (tmp_path / "job").mkdir()
    calm = an_attempt(tmp_path / "calm", 1, config)
    assert run(calm) == 0
    assert_estimate_holds(calm)

    kill_while_saving(an_attempt(tmp_path / "job", 1, config), 6)
    second = an_attempt(tmp_path / "job", 2, config)
    process = start(second)
    wait_for_step(second, process, 10)
    process.kill()
    process.wait()
    kill_while_saving(an_attempt(tmp_path / "job", 3, config), 12)
    last = an_attempt(tmp_path / "job", 4, config)
    assert run(last) == 0

    assert any("going on from step 6" in line.message for line in told(last))
    assert any("removed checkpoint-12: torn" in line.message for line in told(last))
    assert result_of(last).data["digest"] == result_of(calm).data["digest"]
