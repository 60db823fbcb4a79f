"""A real controller whose jobs are fakes and that stops itself (SIGSTOP), once, where it hurts most.

    python -m tests.fakes.sleepy_controller HOME ORDERS [spawn | popen]

`spawn`: about to start an attempt, whose row is written. `popen`: a moment later, the last before the process exists.
It stops between transactions: one that is open would keep every other process from writing, whatever the lease says.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from gateway import controller, processes
from gateway.database import Database
from gateway.jobs.models import JobKind
from gateway.jobs.reconciler import JobReconciler
from gateway.logs import configure_logging
from gateway.processes import ProcessTable
from gateway.settings import load_settings

PROGRAM = Path(__file__).with_name("job.py")


async def quiet(database: Database) -> None:
    """Until no transaction is open; none that writes can begin before the lock is given back."""
    await database._turn.acquire()
    while database._held_by:
        await asyncio.sleep(0.001)


def sleep_once_at(point: str) -> None:
    """Stop at the first start of a child, before it or in the middle of it."""
    spawn, start = ProcessTable.spawn, processes._start
    due: list[Database] = []

    def sleep() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)
        due.pop()._turn.release()

    def starting(*arguments: Any) -> int:
        if due:
            sleep()
        return start(*arguments)

    async def spawning(table: ProcessTable, *arguments: Any, **options: Any) -> int:
        vars(controller)["ProcessTable"].spawn = spawn
        due.append(table._database)
        await quiet(table._database)
        if point == "spawn":
            sleep()
        return await spawn(table, *arguments, **options)

    vars(processes)["_start"] = starting
    vars(controller)["ProcessTable"] = type("ProcessTable", (ProcessTable,), {"spawn": spawning})


def main(home: Path, orders: Path, point: str = "") -> None:
    settings = load_settings(home=home)
    configure_logging(settings)
    programs = {kind: (sys.executable, str(PROGRAM), str(orders), kind) for kind in JobKind}
    vars(controller)["JobReconciler"] = partial(JobReconciler, programs=programs)
    if point:
        sleep_once_at(point)
    asyncio.run(controller.serve_controller(settings))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
