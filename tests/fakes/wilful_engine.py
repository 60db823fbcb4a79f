"""The fake engine with a will of its own: `--orders FILE` (JSON, read anew each time) says what it does wrongly.

{"refuse": [names], "die_on_load": [names], "silent_adapters": [names], "nan": [names], "fail": [names],
 "leak": share of the last adapter that base gets beside other requests,
 "leak_beside_adapters": the same beside adapters' requests only, as vLLM's CPU build has it,
 "strength": {name: share of an adapter that is applied}, "noise": nats by the size of the batch,
 "start": "spin" for a start that computes and does not end, "load_until_told": true, "die_at_start": words,
 "hang": true for answers that never come, "spin": true for computing meanwhile}
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from aiohttp import web

from .engine import FakeEngine


class WilfulEngine(FakeEngine):
    """Refuses, dies, lies or leaks as it was told."""

    def __init__(self, socket: Path, orders: Path, **options: Any) -> None:
        super().__init__(socket, **options)
        self._orders = orders

    def ordered(self, what: str) -> Any:
        """What it was told about `what`; nothing when there is no such order."""
        found = json.loads(self._orders.read_text()) if self._orders.exists() else {}
        return found.get(what, [])

    async def _load(self, request: web.Request) -> web.Response:
        name = (await request.json())["lora_name"]
        if name in self.ordered("die_on_load"):
            os.kill(os.getpid(), 9)
        if name in self.ordered("refuse"):
            self.calls.append(f"refuse {name}")
            message = (
                "Call to add_lora method failed: Worker failed with error 'no', please check the stack trace above"
            )
            return web.json_response(
                {"error": {"message": message, "type": "InternalServerError", "code": 500}}, status=500
            )
        return await super()._load(request)

    async def _complete(
        self, request: web.Request, body: dict[str, Any], *rest: Any, **named: Any
    ) -> web.StreamResponse:
        model = str(body.get("model"))
        if model in self.ordered("nan") and body.get("logprobs"):
            message = "Out of range float values are not JSON compliant"
            return web.json_response(
                {"error": {"message": message, "type": "BadRequestError", "code": 400}}, status=400
            )
        if model in self.ordered("fail"):
            failed = {"error": {"message": "it cannot be done", "type": "InternalServerError", "code": 500}}
            return web.json_response(failed, status=500)
        if model in self.ordered("silent_adapters") and body.get("logprobs"):
            body = body | {"model": self.model_name}  # the weights match nothing: base answers under the adapter's name
        if self.ordered("hang"):
            await self._hang()
        self.noise = self.ordered("noise") or 0.0
        return await super()._complete(request, body, *rest, **named)

    async def _hang(self) -> None:
        """The server answers, the core does not; computing all the time when it is told to."""
        while self.ordered("hang"):
            until = time.monotonic() + 0.05
            while self.ordered("spin") and time.monotonic() < until:
                pass
            await asyncio.sleep(0.01)

    def verified(self, model: str, prompt: list[int], token: int) -> float:
        """What it computes, with whatever is wrong with that."""
        base = super().verified(self.model_name, prompt, token)
        share, leaking = self._share(model), model
        if model == self.model_name and self.adapters:
            leaking = list(self.adapters)[-1]
        return base + share * (super().verified(leaking, prompt, token) - base)

    def _share(self, model: str) -> float:
        if model != self.model_name:
            return float(dict(self.ordered("strength") or {}).get(model, 1.0))
        share = float(self.ordered("leak") or 0.0) if self.running > 1 else 0.0
        is_beside_adapters = self.running > self.running_models[self.model_name]
        return float(self.ordered("leak_beside_adapters") or 0.0) if is_beside_adapters and not share else share


async def _serve(arguments: argparse.Namespace) -> None:
    engine = WilfulEngine(
        arguments.uds,
        arguments.orders,
        model_name=arguments.served_model_name,
        base_path=arguments.model,
        on_death=lambda: os._exit(1),
        slots=arguments.max_cpu_loras,
    )
    while engine.ordered("start") == "spin":
        pass
    if words := engine.ordered("die_at_start"):
        sys.exit(words)
    if engine.ordered("load_until_told"):
        print("Loading weights: 40 %", flush=True)  # noqa: T201
    while engine.ordered("load_until_told"):
        await asyncio.sleep(0.02)
    await engine.start()
    await asyncio.Event().wait()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--orders", type=Path, required=True)
    parser.add_argument("--uds", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-cpu-loras", type=int)
    arguments, _ = parser.parse_known_args()
    asyncio.run(_serve(arguments))


if __name__ == "__main__":
    main()
