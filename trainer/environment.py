"""The environment that training wants to be started in. Light: importing this loads no torch."""

from __future__ import annotations

import os
import sys

from gateway.jobs.allocator import ALLOCATOR

_LIBRARIES = {
    "HF_HUB_OFFLINE": "1",  # a missing file is an error, not a download
    "TOKENIZERS_PARALLELISM": "false",  # its threads and a fork do not go together
}


def training_environment(threads: int | None = None) -> dict[str, str]:
    """Variables that must be set before the process starts: the allocator and OpenMP read them once."""
    count = str(threads or available_cores())
    return {**ALLOCATOR, **_LIBRARIES, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def ensure_environment(module: str, arguments: list[str], *, threads: int | None = None) -> None:
    """Start this process over, under the same id, unless it was started in the right environment."""
    wanted = training_environment(threads)
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], {**os.environ, **wanted})  # noqa: S606
