"""Train from a preset, in this process.

    python -m trainer.run sft --set adapter=support --set dataset=train.jsonl --output build/support

`--output` becomes the bundle. Checkpoints lie beside it, in `<output>.checkpoints`, until it is done: the same command
goes on from the last one after a crash.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from .config import SFTConfig, load_config
from .environment import ensure_environment
from .errors import BadConfig, Cancelled, TrainingError
from .models import OnProgress, Places, Progress, Trained
from .recipes import load_recipe

_STOPPED = 128 + signal.SIGTERM


def run(config: SFTConfig, output: Path, on_progress: OnProgress) -> Trained:
    """Train, leave the bundle at `output`, and clear the checkpoints away."""
    if output.exists():
        raise BadConfig(f"output {output} exists: name another, or remove it", code="output_exists", param="output")
    places = Places(bundle=output, checkpoints=output.with_name(f"{output.name}.checkpoints"))
    trained = load_recipe(config.recipe)(config, places, on_progress)
    shutil.rmtree(places.checkpoints, ignore_errors=True)
    return trained


def cancel_on(number: int, frame: FrameType | None) -> None:
    """A signal handler: stop now; the last checkpoint stays. A further signal changes nothing: it stops already."""
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    raise Cancelled(signal.Signals(number).name)


def main(arguments: list[str] | None = None) -> int:
    """Command line. 0: trained; 1: it failed; 2: the config or the data is wrong; 143: stopped by a signal, or unheard."""
    try:
        return _main(arguments)
    except BrokenPipeError:
        if not _is_unheard():
            raise
        _fall_silent()
        return _STOPPED


def _main(arguments: list[str] | None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    tell = _tell_json if options.json else _tell_text
    try:
        config = load_config(options.preset, options.set)
        ensure_environment("trainer.run", given, threads=config.threads)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, cancel_on)
        trained = run(config, options.output, tell)
    except TrainingError as error:
        tell(Progress(f"{error.message} [{error.code}]", level="error"))
        return 2 if error.code in ("bad_config", "bad_data", "no_such_file", "output_exists") else 1
    except (Cancelled, KeyboardInterrupt):
        tell(Progress("stopped; the same command goes on from the last checkpoint", level="warn"))
        return _STOPPED
    if options.json:
        print(json.dumps({"trained": asdict(trained)}, default=str), flush=True)  # noqa: T201
    return 0


def _is_unheard() -> bool:
    """Whether the reader of our output is gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _fall_silent() -> None:
    """Nobody reads us any more; what is still in a buffer then breaks no pipe at the end either."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", help="a YAML file, or the name of a preset that ships")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--output", type=Path, required=True, help="where the bundle will be; must not exist")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def _tell_json(progress: Progress) -> None:
    print(json.dumps(asdict(progress)), flush=True)  # noqa: T201


def _tell_text(progress: Progress) -> None:
    prefix = "" if progress.level == "info" else f"{progress.level}: "
    stream = sys.stderr if progress.level == "error" else sys.stdout
    print(f"{prefix}{progress.message}", file=stream, flush=True)


if __name__ == "__main__":
    sys.exit(main())
