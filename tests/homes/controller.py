"""The controller, with programs that stand in for trainer, evaluator and verification: they load no model.

`TESTS_ORDERS` names the folder that tells the stand-ins what to do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import cast

from gateway import controller
from gateway.engine import replicas
from gateway.jobs.launch import PROGRAMS
from gateway.jobs.models import JobKind

ROOT = Path(__file__).parents[2]
VERIFY = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.long.parts.verify import main; main(sys.argv[1])"
JOB = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path; from tests.fakes.job import main; "
    "main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))"
)

if __name__ == "__main__":
    programs = cast("dict[JobKind, tuple[str, ...]]", PROGRAMS)
    programs[JobKind.VERIFY] = (sys.executable, "-c", VERIFY)
    for kind in (JobKind.FINE_TUNING, JobKind.EVALUATION):
        programs[kind] = (sys.executable, "-c", JOB, os.environ["TESTS_ORDERS"], str(kind))
    replicas.STABLE_AFTER_S = 1.0
    controller.main()
