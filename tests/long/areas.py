"""The areas of `make test-long`: which files prove what. An area takes at most 40 minutes on two cores.

    python -m tests.long.areas AREA     # the area's files; without one, everybody's

A test of the project checks that every long test is in exactly one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

AREAS: Mapping[str, tuple[str, ...]] = {
    "framing": ("tests/long/test_framing_corpus.py",),
    "rollouts": ("tests/long/test_rollout_simulation.py",),
    "residency": ("tests/long/test_residency_simulation.py", "tests/integration/test_engine_room.py"),
    "kills": ("tests/long/test_kill_matrix.py", "tests/integration/test_trainer_kill.py"),
    "soak": ("tests/long/test_soak.py",),
    "mutants": ("tests/long/test_mutants.py",),
    "engine": ("tests/e2e/test_60_own_engine.py", "tests/e2e/test_70_kill.py", "tests/e2e/test_80_engine_memory.py"),
}


def files_of(area: str) -> tuple[str, ...]:
    """Files to run. Raises `KeyError` for an area that there is not."""
    return AREAS[area] if area else tuple(file for files in AREAS.values() for file in files)


def seeds(default: int) -> int:
    """How many seeds a simulation runs: `make test-long SEEDS=N`, or as many as are worth their time."""
    given = os.environ.get("TURNOUT_SIMULATION_SEEDS", "")
    if given and (not given.isdecimal() or int(given) < 1):
        raise ValueError(f"SEEDS is {given!r}: give a number of seeds, such as {10 * default}")
    return int(given) if given else default


def main(area: str) -> None:
    """Print the files, or say which areas there are."""
    try:
        print(" ".join(files_of(area)))  # noqa: T201
    except KeyError:
        sys.exit(f"AREA={area} is no area of the long tests: take one of {', '.join(AREAS)}, or none for all")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
