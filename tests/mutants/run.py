"""Plant each fault in a copy of the tree and see whether its tests notice.

    python -m tests.mutants.run                 # all of them
    python -m tests.mutants.run --only NAME     # one

Exits 1 when fewer than 95 % are noticed, when a fault finds no place any more, or when tests fail without any fault.
"""

from __future__ import annotations

import argparse
import compileall
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .faults import Fault, load_faults

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("gateway", "trainer", "evals", "deploy", "tests", "pyproject.toml")
LEAST_SHARE = 0.95
# A test that hangs on a fault has noticed it. Far more than the few seconds that each of them takes: no machine is that slow.
HANGS_AFTER_S = 120
SLOW_TEST_S = 5
_TESTS_FAILED = 1  # pytest's exit code; others say that tests could not run, which is no notice

Outcome = Literal["killed", "survived", "broken", "misplaced"]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one fault."""

    fault: Fault
    outcome: Outcome
    took_s: float
    told: str = ""


@contextmanager
def copied_tree(root: Path = ROOT) -> Iterator[Path]:
    """A copy of the code that faults may be planted in, gone at the end.

    Its compiled files are checked by content: a fault of the same size, planted within a second, has the same time stamp.
    """
    with tempfile.TemporaryDirectory(prefix="turnout-mutants-") as temporary:
        tree = Path(temporary)
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (root / name).is_file():
                shutil.copy(root / name, tree / name)
        compileall.compile_dir(tree, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
        yield tree


def run_tests(tree: Path, tests: Sequence[str], *, is_first_enough: bool) -> tuple[int, str]:
    """Exit code of pytest over these tests in that tree, and what it said."""
    argv = [sys.executable, "-m", "pytest", "-q", "--tb=line", f"--timeout={HANGS_AFTER_S}", *tests]
    argv += ["--durations=0", f"--durations-min={SLOW_TEST_S}"]
    argv += ["-x"] if is_first_enough else []
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryFile("w+") as said:  # a pipe would wait for every process that a killed test leaves behind
        done = subprocess.run(argv, cwd=tree, env=environment, stdout=said, stderr=said, check=False)
        said.seek(0)
        return done.returncode, said.read()


def control(tree: Path, faults: Sequence[Fault]) -> tuple[int, str]:
    """The same tests without any fault: a failure now would count as notice later."""
    tests = sorted({test for fault in faults for test in fault.tests})
    return run_tests(tree, tests, is_first_enough=False) if tests else (0, "")


def try_fault(tree: Path, fault: Fault) -> Result:
    """Plant, test, take out again."""
    path = tree / fault.file
    text = path.read_text()
    started = time.monotonic()
    try:
        path.write_text(fault.planted(text))
    except ValueError as error:
        return Result(fault, "misplaced", 0.0, str(error))
    try:
        code, said = run_tests(tree, fault.tests, is_first_enough=True)
    finally:
        path.write_text(text)
    outcomes: dict[int, Outcome] = {0: "survived", _TESTS_FAILED: "killed"}
    return Result(fault, outcomes.get(code, "broken"), time.monotonic() - started, said)


def is_enough(results: Sequence[Result]) -> bool:
    """Whether every fault could be tried and enough of them were noticed."""
    killed = sum(result.outcome == "killed" for result in results)
    could_be_tried = all(result.outcome in ("killed", "survived") for result in results)
    return could_be_tried and killed >= LEAST_SHARE * len(results)


def main() -> int:
    """Entry of the program."""
    parser = argparse.ArgumentParser(description="Plant faults in guards and see whether tests notice.")
    parser.add_argument("--only", help="the one fault of this name")
    only = parser.parse_args().only
    listed = [fault for fault in load_faults() if only in (None, fault.name)]
    if not listed:
        return _say(f"no fault is called {only!r}")
    faults = [fault for fault in listed if fault.equivalent is None]
    with copied_tree() as tree:
        code, said = control(tree, faults)
        if code:
            return _say(f"{said[-6000:]}\nthese tests fail without any fault")
        print(said[-2000:], flush=True)  # noqa: T201 - names the tests that are slow here
        results = []
        for fault in faults:
            result = try_fault(tree, fault)
            results.append(result)
            print(f"{result.outcome:9} {result.took_s:5.1f} s  {fault.name}", flush=True)  # noqa: T201
            if result.outcome in ("broken", "misplaced"):
                print(result.told[-2000:], flush=True)  # noqa: T201
    for fault in listed:
        if fault.equivalent is not None:
            print(f"equivalent         {fault.name}: {fault.equivalent}")  # noqa: T201
    killed = sum(result.outcome == "killed" for result in results)
    print(f"{killed} of {len(results)} faults were noticed")  # noqa: T201
    return 0 if is_enough(results) else 1


def _say(text: str) -> int:
    print(text)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
