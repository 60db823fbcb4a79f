"""A gateway for evaluators: answers as the fake engine does, under the headers of whatever version it is told to be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from .answers import logprob


@dataclass
class StubTarget:
    """What stands behind a name: the digest in the headers, the identity that answers, and what it says in a chat.

    `knows` overrides the log-probability of a token after a prompt where it has an opinion.
    """

    digest: str
    identity: str
    chat: Callable[[list[dict[str, str]]], str] = lambda messages: "nothing"
    knows: Callable[[list[int], int], float | None] = lambda prompt, token: None


@dataclass
class StubGateway:
    """An HTTP server on a loopback port, in a thread of its own.

    `fail_next` answers that many requests with 503; `fails_after` all that come after so many.
    """

    targets: dict[str, StubTarget]
    engine: str = "vllm-0.32.0-fake"
    fail_next: int = 0
    fails_after: int | None = None
    restarts_after: int | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> StubGateway:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def asked_of(self, name: str) -> list[dict[str, Any]]:
        """Bodies of the requests that named this target."""
        return [body for body in self.asked if body["model"] == name]

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()

        def choice(target: StubTarget) -> dict[str, Any]:
            prompt = body["prompt"]
            values = {t: target.knows(prompt, t) for t in body["logprob_token_ids"]}
            found = {
                f"token_id:{token}": logprob(target.identity, prompt, token) if value is None else value
                for token, value in values.items()
            }
            best = max(found, key=lambda token: found[token])
            return {"text": "x", "finish_reason": "length", "logprobs": {"tokens": [best], "top_logprobs": [found]}}

        return self._answer(body, choice)

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        return self._answer(
            body,
            lambda target: {
                "message": {"role": "assistant", "content": target.chat(body["messages"])},
                "finish_reason": "stop",
            },
        )

    def _answer(self, body: dict[str, Any], choice: Callable[[StubTarget], dict[str, Any]]) -> web.Response:
        self.asked.append(body)
        if self.restarts_after is not None and len(self.asked) > self.restarts_after:
            self.engine = "another engine"
        if self.fail_next or (self.fails_after is not None and len(self.asked) > self.fails_after):
            self.fail_next = max(self.fail_next - 1, 0)
            return web.json_response({"error": {"message": "engine restarts"}}, status=503)
        target = self.targets.get(body["model"])
        if target is None:
            return web.json_response({"error": {"message": f"{body['model']} does not exist"}}, status=404)
        headers = {"x-turnout-digest": target.digest, "x-turnout-version": body["model"]}
        return web.json_response({"choices": [choice(target)], "system_fingerprint": self.engine}, headers=headers)
