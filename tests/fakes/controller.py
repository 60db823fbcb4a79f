"""Only the job loop of a controller, over a home that a test made: `python -m tests.fakes.controller HOME ORDERS`."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from gateway.registry.base_family import load_base_family
from gateway.settings import BaseModelSettings, EngineSettings, JobSettings, Settings
from tests.jobs_world import opened_world


async def main(home: Path, orders: Path) -> None:
    base = load_base_family("tiny", orders / "base")
    settings = Settings(
        home=home,
        base_model=BaseModelSettings(name=base.name, path=base.path),
        engine=EngineSettings(enabled=False),
        jobs=JobSettings(threads=1),
    )
    async with opened_world(settings, base, orders) as world:
        processes = world.processes()
        await processes.adopt()
        reconciler = world.reconciler(processes=processes)
        while True:
            await reconciler.tick()
            await asyncio.sleep(0.02)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2])))
