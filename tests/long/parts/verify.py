"""Verification in a second: every version is sane, and its reference is what the fake engine will answer."""

from __future__ import annotations

import json
from pathlib import Path

from gateway.jobs.workdir import WorkDirectory
from tests.fakes.answers import fake_reference

PROMPTS = 3


def main(directory: str) -> None:
    """Of the attempt in this directory."""
    work = WorkDirectory(Path(directory))
    spec = work.spec()
    reference = fake_reference(Path(spec["adapter_dir"]))
    kept = {**reference, "digest": spec["digest"], "prompts": reference["prompts"][:PROMPTS]}
    (work.path / "reference.json").write_text(json.dumps(kept))
    work.finish(spec["token"], ok=True, data={"log_loss": 3.1, "base_log_loss": 3.2})
