"""Signs of life of an engine."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from ..errors import GatewayError
from ..settings import EngineSettings
from .admin import EngineAdmin, EngineUnreachable

Health = Literal["unknown", "healthy", "dead", "silent"]

_CANARY_TOKEN = 1


class Pulse:
    """Keeps asking one engine for a sign of life. Its server answering is not enough: the core must do work."""

    def __init__(self, admin: EngineAdmin, engine: EngineSettings) -> None:
        self._admin = admin
        self._engine = engine
        self.health: Health = "unknown"
        self.last_work = time.monotonic()
        self.watches_core = False

    def forgive(self) -> None:
        """Begin to count silence anew."""
        self.last_work = time.monotonic()

    async def run(self) -> None:
        """Until cancelled."""
        next_canary = 0.0
        while True:
            await self._look()
            if self.watches_core and self.health == "healthy" and time.monotonic() >= next_canary:
                await self._canary()
                next_canary = time.monotonic() + self._engine.hang_timeout_s / 5
            await asyncio.sleep(self._engine.health_interval_s)

    async def _look(self) -> None:
        try:
            answer = await self._admin.is_healthy(self._engine.hang_timeout_s / 2)
            self.health = "healthy" if answer else "dead"
        except EngineUnreachable:
            self.health = "silent"

    async def _canary(self) -> None:
        """One token of the base model. Behind a long queue it comes late: then others' tokens are the sign of life."""
        timeout_s = self._engine.hang_timeout_s / 2
        asked = self._admin.generate(self._admin.base_model, [_CANARY_TOKEN], max_tokens=1, timeout_s=timeout_s)
        canary = asyncio.create_task(asked)
        try:
            done, _ = await asyncio.wait({canary}, timeout=timeout_s / 5)
            before = None if done else await self._work_done()
            await canary
        except GatewayError:
            after = await self._work_done()
            if after is None or after == before:
                return
        finally:
            canary.cancel()
        self.last_work = time.monotonic()

    async def _work_done(self) -> float | None:
        try:
            return await self._admin.work_done(self._engine.hang_timeout_s / 5)
        except EngineUnreachable:
            return None
