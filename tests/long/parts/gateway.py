"""The gateway, which also says every half second how many tasks and requests it has: into `gateway.json` of its home."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

from gateway import app
from gateway.app import Gateway
from tests.files import put_text

_EVERY_S = 0.5


async def _tell(gateway: Gateway) -> None:
    path = Path(gateway.settings.home) / "gateway.json"
    while True:
        seen = {"pid": os.getpid(), "tasks": len(asyncio.all_tasks()), "in_flight": gateway.lifecycle.in_flight}
        put_text(path, json.dumps(seen | {"queued": gateway.recorder.queued}))
        await asyncio.sleep(_EVERY_S)


class TellingGateway(Gateway):
    """Starts and stops the telling with everything else."""

    async def start(self) -> None:
        await super().start()
        self._telling = asyncio.create_task(_tell(self))

    async def stop(self) -> None:
        self._telling.cancel()
        await super().stop()


if __name__ == "__main__":
    app.Gateway = TellingGateway  # type: ignore[misc]
    app.main()
