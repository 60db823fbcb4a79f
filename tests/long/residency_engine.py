"""Engines in this very process, on a real socket, one after the other; each notes what it is asked and fails as it is told."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal, Protocol

from aiohttp import web

from gateway.engine.models import ReplicaProcess, ReplicaSpec
from tests.fakes.engine import FakeEngine


class Teller(Protocol):
    """Who says how a version misbehaves, and hears of every load."""

    late: dict[str, str]
    hiccups: set[str]

    def fault_of(self, name: str) -> str | None: ...

    async def note_load(self, body: dict[str, Any]) -> None: ...


class Engine(FakeEngine):
    """One start of the engine: notes what it is asked, and fails as it is told."""

    def __init__(self, socket: Path, teller: Teller, fleet: InProcessFleet, *, model: str) -> None:
        super().__init__(socket, model_name=model, on_death=fleet.note_death, slots=fleet.slots)
        self.epoch = f"start-{fleet.starts}"
        self.probed: Counter[str] = Counter()  # answers with log-probabilities since the load
        self._teller = teller

    async def _load(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        name = body["lora_name"]
        await self._teller.note_load(body)
        fault = self._teller.fault_of(name)
        if fault == "die":
            self.die()
        if fault == "refuse":
            return web.json_response({"error": {"message": "Call to add_lora method failed", "code": 500}}, status=500)
        is_late = self._teller.late.pop(name, None)
        if is_late == "never":
            await asyncio.Event().wait()
        self.probed[name] = 0
        answer = await super()._load(request)
        if is_late == "done":
            await asyncio.Event().wait()
        return answer

    async def _complete(
        self, request: web.Request, body: dict[str, Any], *rest: Any, **named: Any
    ) -> web.StreamResponse:
        name = str(body.get("model"))
        fault = self._teller.fault_of(name)
        if fault == "fail" or name in self._teller.hiccups:
            self._teller.hiccups.discard(name)
            return web.json_response({"error": {"message": "it cannot be done", "code": 500}}, status=500)
        if fault == "nan":
            return web.json_response({"error": {"message": "Out of range float values", "code": 400}}, status=400)
        asked = body | {"model": self.model_name} if fault == "silent" else body
        answer = await super()._complete(request, asked, *rest, **named)
        self.probed[name] += bool(body.get("logprobs")) and name in self.adapters
        return answer


class InProcessFleet:
    """A driver of one replica: engines in this process, each on the same socket, one after the other."""

    def __init__(self, teller: Teller, *, replica_id: str, model: str, slots: int) -> None:
        self._teller = teller
        self._replica_id = replica_id
        self._model = model
        self.slots = slots
        self._turn = asyncio.Lock()
        self.engine: Engine | None = None
        self.is_running = False
        self.starts = 0

    async def ensure(self, spec: ReplicaSpec) -> ReplicaProcess:
        async with self._turn:
            if not self.is_running:
                await self._end()
                self.starts += 1
                self.engine = Engine(Path(spec.socket), self._teller, self, model=self._model)
                await self.engine.start()
                self.is_running = True
        return (await self.replicas())[0]

    async def replicas(self) -> list[ReplicaProcess]:
        if self.engine is None:
            return []
        state: Literal["running", "exited"] = "running" if self.is_running else "exited"
        return [ReplicaProcess(id=self._replica_id, state=state, epoch=self.engine.epoch)]

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        async with self._turn:
            await self._end()

    def note_death(self) -> None:
        self.is_running = False

    async def _end(self) -> None:
        self.is_running = False
        if self.engine is not None:
            await self.engine.stop()
