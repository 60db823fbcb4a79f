"""Questions to the gateway, on a pinned version, with the evaluator's key. Every answer's headers are checked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from .errors import ServingFailed, WrongVersionServed
from .items import Message

In = TypeVar("In")
Out = TypeVar("Out")
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
MAX_CANDIDATES = 20


@dataclass(frozen=True, slots=True)
class Target:
    """Something that can be asked by name, and the digest that its answers must carry."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the gateway is, and how hard to press it."""

    url: str
    api_key: str | None = None
    concurrency: int = 16
    patience_s: float = 180.0  # an engine that restarts is back within this; longer, and the job is tried again later
    request_timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class NextToken:
    """Log-probabilities asked for, and the token that greedy decoding picks."""

    logprobs: Mapping[int, float]
    greedy: int
    engine: str


@dataclass(frozen=True, slots=True)
class Generated:
    """A chat answer."""

    text: str
    finish_reason: str
    engine: str


class Serving:
    """The serving path as users have it: the gateway's own API."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    def next_tokens(self, target: Target, questions: Sequence[tuple[Sequence[int], Sequence[int]]],
                    done: Callable[[int], None] = lambda _: None, *, concurrency: int | None = None) -> list[NextToken]:  # fmt: skip
        """For each (prompt's token ids, candidates' ids): the candidates' log-probabilities as the next token."""

        async def ask(client: httpx.AsyncClient, question: tuple[Sequence[int], Sequence[int]]) -> NextToken:
            return await self._next_token(client, target, *question)

        return asyncio.run(self._all(ask, questions, done, concurrency or self.endpoint.concurrency))

    def chats(self, target: Target, prompts: Sequence[Sequence[Message]], *, max_tokens: int, stop: Sequence[str] = (),
              done: Callable[[int], None] = lambda _: None) -> list[Generated]:  # fmt: skip
        """The greedy answer to each chat."""

        async def ask(client: httpx.AsyncClient, prompt: Sequence[Message]) -> Generated:
            return await self._chat(client, target, prompt, max_tokens, stop)

        return asyncio.run(self._all(ask, prompts, done, self.endpoint.concurrency))

    async def _all(self, ask: Callable[[httpx.AsyncClient, In], Awaitable[Out]], questions: Sequence[In],
                   done: Callable[[int], None], concurrency: int) -> list[Out]:  # fmt: skip
        gate = asyncio.Semaphore(concurrency)
        finished = 0

        async def one(client: httpx.AsyncClient, question: In) -> Out:
            nonlocal finished
            async with gate:
                answer = await ask(client, question)
            finished += 1
            done(finished)
            return answer

        headers = {"authorization": f"Bearer {self.endpoint.api_key}"} if self.endpoint.api_key else {}
        async with httpx.AsyncClient(
            base_url=self.endpoint.url, headers=headers, timeout=self.endpoint.request_timeout_s, trust_env=False,
            limits=httpx.Limits(max_connections=self.endpoint.concurrency),
        ) as client:  # fmt: skip
            tasks = [asyncio.ensure_future(one(client, question)) for question in questions]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _next_token(self, client: httpx.AsyncClient, target: Target, prompt: Sequence[int],
                          candidates: Sequence[int]) -> NextToken:  # fmt: skip
        if not 1 <= len(candidates) <= MAX_CANDIDATES:
            raise ValueError(f"{len(candidates)} candidates; the engine gives 1 to {MAX_CANDIDATES}")
        body = await self._post(client, target, "/v1/completions", {
            "model": target.name, "prompt": list(prompt), "max_tokens": 1, "temperature": 0,
            "logprobs": len(candidates), "logprob_token_ids": list(candidates), "return_tokens_as_token_ids": True,
        })  # fmt: skip
        try:
            given = body["choices"][0]["logprobs"]
            found = {_token_id(token): float(value) for token, value in given["top_logprobs"][0].items()}
            return NextToken({c: found[c] for c in candidates}, _token_id(given["tokens"][0]), _engine(body))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServingFailed(
                f"{target.name} answered without the log-probabilities of tokens {list(candidates)} ({error!r}); "
                "does the key have scope `evaluate`?"
            ) from error

    async def _chat(self, client: httpx.AsyncClient, target: Target, prompt: Sequence[Message], max_tokens: int,
                    stop: Sequence[str]) -> Generated:  # fmt: skip
        fields: dict[str, Any] = {
            "model": target.name, "messages": [message.model_dump() for message in prompt],
            "max_tokens": max_tokens, "temperature": 0,
        }  # fmt: skip
        if stop:
            fields["stop"] = list(stop)
        body = await self._post(client, target, "/v1/chat/completions", fields)
        try:
            choice = body["choices"][0]
            return Generated(choice["message"]["content"] or "", str(choice["finish_reason"]), _engine(body))
        except (KeyError, IndexError, TypeError) as error:
            raise ServingFailed(f"{target.name} answered without a message: {str(body)[:200]}") from error

    async def _post(
        self, client: httpx.AsyncClient, target: Target, path: str, fields: dict[str, Any]
    ) -> dict[str, Any]:
        """One answer; what may pass is tried again until patience ends, what may not is told at once."""
        until = time.monotonic() + self.endpoint.patience_s
        wait_s = 0.25
        while True:
            try:
                response = await client.post(path, json=fields)
                if response.status_code == 200:
                    return _checked(target, response)
                fault = f"HTTP {response.status_code}: {response.text[:300]}"
                if response.status_code not in _AGAIN:
                    raise ServingFailed(f"{target.name} cannot be asked at {path}: {fault}")
            except httpx.TransportError as error:
                fault = f"{type(error).__name__}: {error}"
            if time.monotonic() + wait_s > until:
                raise ServingFailed(
                    f"{target.name} did not answer at {path} for {self.endpoint.patience_s:g} s: {fault}"
                )
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, 8.0)


def _checked(target: Target, response: httpx.Response) -> dict[str, Any]:
    served = response.headers.get("x-turnout-digest")
    if served != target.digest:
        raise WrongVersionServed(
            f"asked {target.name} ({target.digest[:12]}), answered by {response.headers.get('x-turnout-version')} "
            f"({str(served)[:12]}): nothing measured here would be about {target.name}"
        )
    try:
        body = response.json()
    except ValueError as error:
        raise ServingFailed(f"{target.name} answered something that is not JSON: {response.text[:200]}") from error
    if not isinstance(body, dict):
        raise ServingFailed(f"{target.name} answered {type(body).__name__}, not an object")
    return body


def _token_id(token: str) -> int:
    """`token_id:123` as 123."""
    return int(token.removeprefix("token_id:"))


def _engine(body: dict[str, Any]) -> str:
    return str(body.get("system_fingerprint") or "unreported")
