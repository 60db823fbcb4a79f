"""A job's program without torch: does as `ORDERS/<kind>.json` says for its attempt, and leaves what a real one leaves.

    python tests/fakes/job.py ORDERS KIND DIR

Orders are a list, one for each attempt, the last for all later ones: {"do": "finish" | "fail" | "crash" | "hang" | "mute" | "quit" |
"leave" (a `text` as the rest of its result) | "litter" (something `made` where the file `name` belongs)}.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from gateway.jobs.workdir import WorkDirectory


def main(orders: Path, kind: str, directory: Path) -> None:
    work = WorkDirectory(directory)
    spec = work.spec()
    number = int(directory.name)
    seen = {"pid": os.getpid(), "env": dict(os.environ), "cwd": str(Path.cwd()), "spec": spec, "argv": sys.argv}
    told = orders / f"seen-{directory.parent.name}-{number}.json"
    told.with_suffix(".new").write_text(json.dumps(seen))
    told.with_suffix(".new").replace(told)  # whole, or not there; runs as a script, which finds no `tests.files`
    known = json.loads((orders / f"{kind}.json").read_text())
    order = known[min(number, len(known)) - 1]
    act(work, spec, kind, order, orders)


def act(work: WorkDirectory, spec: dict[str, Any], kind: str, order: dict[str, Any], orders: Path) -> None:
    match order["do"]:
        case "crash":
            work.say("about to crash")
            print("Traceback: CUDA is a mystery")  # noqa: T201
            sys.exit(3)
        case "quit":
            sys.exit(0)
        case "mute":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            wait_for(orders / "release")
        case "hang":
            work.say("hanging")
            wait_for(orders / "release")
            finish(work, spec, kind, order)
        case "fail":
            work.finish(spec["token"], ok=False, error_code=order["code"], error_message=order["message"])
        case "leave":
            (work.path / "result.json").write_text(f'{{"token": "{spec["token"]}", {order["text"]}}}')
        case "litter":
            work.say("littering")
            litter(work.path / order["name"], order["made"])
            if order["name"] != "result.json":
                work.finish(spec["token"], ok=True)
        case _:
            if "progress" in order:
                (work.path / "progress.jsonl").write_text(order["progress"])
            work.say("step", loss=0.5)
            finish(work, spec, kind, order)


def finish(work: WorkDirectory, spec: dict[str, Any], kind: str, order: dict[str, Any]) -> None:
    data: dict[str, Any] = {}
    if kind == "fine_tuning":
        shutil.copytree(order["bundle"], work.path / "bundle")
        data = {"bundle": "bundle", "trained_tokens": 1234, "metrics": {"loss": 0.25, "worst": float("nan")}}
    elif kind == "verify":
        reference = {"schema": 1, "digest": spec["digest"], "prompts": [{"token_ids": [1]}], "fingerprint": {}}
        (work.path / "reference.json").write_text(json.dumps(reference))
        data = {"log_loss": 3.1, "base_log_loss": 3.2}
    else:
        data = {"verdict": "passed", "reason": "gain +0.9", "fingerprint": "f" * 64, "report": {"rows": []}, "looks": 1}
        (work.path / "report.md").write_text("# Report\n")
    work.finish(spec["token"], ok=True, data=data | order.get("data", {}))


def litter(path: Path, made: str) -> None:
    path.unlink(missing_ok=True)
    if made == "directory":
        path.mkdir()
    elif made == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
