"""The controller, with a verification that loads no model: it leaves the reference that the fake engine agrees with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

from gateway import controller
from gateway.engine import replicas
from gateway.jobs.launch import PROGRAMS
from gateway.jobs.models import JobKind

ROOT = Path(__file__).parents[3]
VERIFY = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.long.parts.verify import main; main(sys.argv[1])"

if __name__ == "__main__":
    cast("dict[JobKind, tuple[str, ...]]", PROGRAMS)[JobKind.VERIFY] = (sys.executable, "-c", VERIFY)
    replicas.STABLE_AFTER_S = 1.0
    controller.main()
