"""A fine-tuning job's process: `python -m trainer.job DIR`.

Reads `DIR/spec.json`, tells progress, leaves `DIR/bundle` and then `DIR/result.json`. Checkpoints lie beside the attempts,
so that the next attempt goes on from the last whole one. A SIGTERM ends it without a result: whoever sent it knows whether
the job was cancelled, or only has to wait for the next start.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from gateway.errors import GatewayError
from gateway.jobs.workdir import WorkDirectory

from .config import SFTConfig, parse_config
from .environment import ensure_environment
from .errors import Cancelled, TrainingError
from .models import Places, Progress, Trained
from .recipes import load_recipe
from .run import cancel_on

STOPPED = 128 + signal.SIGTERM


def main(arguments: list[str] | None = None) -> int:
    """0: there is a result, good or bad; 143: stopped on request; anything else: a crash, worth another attempt."""
    given = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, cancel_on)
    work = WorkDirectory(Path(given[0]))
    try:
        _work(work, work.spec(), given)
    except Cancelled:
        work.say("stopped on request; the last checkpoint stays", level="warn")
        return STOPPED
    return 0


def _work(work: WorkDirectory, spec: dict[str, Any], given: list[str]) -> None:
    token = str(spec["token"])
    try:
        config = parse_config(spec["config"], source="the job's config")
        ensure_environment("trainer.job", given, threads=config.threads)
        trained = _train(work, config)
    except (TrainingError, GatewayError) as error:
        logging.getLogger(__name__).error("training refused: %s", error.message)
        work.finish(token, ok=False, error_code=error.code, error_message=error.message)
        return
    data = {
        "bundle": trained.bundle.name,
        "digest": trained.digest,
        "trained_tokens": trained.tokens,
        "metrics": trained.metrics,
    }
    work.finish(token, ok=True, data=data)
    shutil.rmtree(_checkpoints(work.path), ignore_errors=True)


def _train(work: WorkDirectory, config: SFTConfig) -> Trained:
    def on_progress(progress: Progress) -> None:
        work.say(progress.message, level=progress.level, **progress.numbers)

    bundle = work.path / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    return load_recipe(config.recipe)(config, Places(bundle, _checkpoints(work.path)), on_progress)


def _checkpoints(directory: Path) -> Path:
    return directory.resolve().parent / "checkpoints"


if __name__ == "__main__":
    sys.exit(main())
