"""A stateful stand-in for vLLM's server: same routes, same statuses, same refusals, on a real Unix socket.

`python -m tests.fakes.engine --uds PATH --served-model-name NAME` runs it as a process; other arguments of vLLM are
taken and ignored. In a test's own loop: `async with FakeEngine(socket) as engine`. Like the real one it serves base
when a request names no model, and dies of `prompt_logprobs`: the gateway must never let either through.

Its memory of adapters is vLLM's: the least recently used goes at a load that finds it full, unloading only takes a name
off the list, and a request for a listed adapter that went reads its files again, which kills it when they are gone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from aiohttp import web

from .answers import (
    Directives,
    answer_tokens,
    batch_noise,
    fake_reference,
    has_nan,
    logprob,
    prompt_token_ids,
    read_header,
    weights_identity,
)

__all__ = ["FakeEngine", "Loaded", "fake_reference"]

_ENDLESS_TOKEN_MS = 4  # a request that ignores the end takes time, as it does for real


@dataclass(frozen=True)
class Loaded:
    """One adapter in the engine."""

    path: Path
    identity: str
    is_poisoned: bool
    number: int = 0  # of the load; 0: came by no load, and is outside the memory's count


@dataclass(frozen=True)
class Asked:
    """One completion request, as the engine read it."""

    path: str
    body: dict[str, Any]


class FakeEngine:
    """The engine's state and its routes."""

    def __init__(
        self,
        socket: Path,
        *,
        model_name: str = "smollm2-135m",
        base_path: str = "/models/base",
        on_death: Callable[[], None] | None = None,
        slots: int | None = None,
    ) -> None:
        self.socket = socket
        # Adapters that it keeps; None: without end. The memory holds what was unloaded too, least recently used first.
        self.slots = slots
        self.memory: OrderedDict[int, str] = OrderedDict()
        self.reread: list[str] = []
        self._loads = 0
        self.model_name = model_name
        self.base_path = base_path
        self.adapters: dict[str, Loaded] = {}
        self.asked: list[Asked] = []
        self.running = 0
        self.running_models: Counter[str] = Counter()
        self.cancelled = 0
        self.completed = 0
        self.is_healthy = True
        self.calls: list[str] = []
        # Nats by which the size of a batch may move a log-probability.
        self.noise = 0.0
        # A name to answer under in place of the one that was asked for.
        self.impostor: str | None = None
        self._on_death = on_death
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> FakeEngine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen on the socket."""
        app = web.Application(client_max_size=2**30)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.post("/v1/load_lora_adapter", self._load),
                web.post("/v1/unload_lora_adapter", self._unload),
                web.post("/v1/chat/completions", self._chat),
                web.post("/v1/completions", self._completions),
                web.get("/fake/state", self._state),
            ]
        )
        self.socket.unlink(missing_ok=True)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self.socket)).start()

    async def stop(self) -> None:
        """Stop listening, close every connection."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self.socket.unlink(missing_ok=True)

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return 0 if self._runner is None or self._runner.server is None else len(self._runner.server.connections)

    def load(self, name: str, path: Path) -> None:
        """Put an adapter in without asking over HTTP."""
        weights = path / "adapter_model.safetensors"
        made = Loaded(path, weights_identity(weights), has_nan(weights), self._loads + 1)
        self._loads += 1
        self._keep(made.number, name)
        self.adapters[name] = made

    def _keep(self, number: int, name: str) -> None:
        """The most recently used from now on; the least is forgotten when there is no room."""
        if number not in self.memory and self.slots is not None and len(self.memory) >= self.slots:
            self.memory.popitem(last=False)
        self.memory[number] = name
        self.memory.move_to_end(number)

    def forgotten(self) -> set[str]:
        """Listed, and read from disk in the middle of a step when it is asked for."""
        return {name for name, held in self.adapters.items() if held.number and held.number not in self.memory}

    def _use(self, name: str) -> None:
        held = self.adapters[name]
        if not held.number:
            return
        if held.number not in self.memory:
            self.reread.append(name)
            if not (held.path / "adapter_model.safetensors").is_file():
                self.die()
        self._keep(held.number, name)

    def load_named(self, name: str) -> None:
        """Put an adapter in that has no files: its identity is its name."""
        self.adapters[name] = Loaded(Path(f"/artifacts/{name}"), name, is_poisoned=False)

    # ---- Management -------------------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_healthy else 503)

    async def _models(self, request: web.Request) -> web.Response:
        created = int(time.time())
        cards = [
            {
                "id": self.model_name,
                "object": "model",
                "created": created,
                "owned_by": "vllm",
                "root": self.base_path,
                "parent": None,
            }
        ]
        cards += [
            {
                "id": name,
                "object": "model",
                "created": created,
                "owned_by": "vllm",
                "root": str(adapter.path),
                "parent": self.model_name,
            }
            for name, adapter in self.adapters.items()
        ]
        return web.json_response({"object": "list", "data": cards})

    async def _load(self, request: web.Request) -> web.Response:
        body = await _read_object(request)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not isinstance(name, str) or not isinstance(path, str):
            return _error(400, "Bad Request", "1 validation error: lora_name, lora_path")
        if not name or not path:
            return _error(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        self.calls.append(f"load {name}")
        if name == self.model_name:
            return _error(400, "InvalidUserInput", f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.adapters and not body.get("load_inplace"):
            return _error(
                400,
                "InvalidUserInput",
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to True.",
            )
        if not (Path(path) / "adapter_config.json").is_file():
            return _error(404, "NotFoundError", f"Loading lora {name} failed: No adapter found for {path}")
        try:
            json.loads((Path(path) / "adapter_config.json").read_bytes())
            read_header(Path(path) / "adapter_model.safetensors")
            self.load(name, Path(path))
        except (OSError, ValueError, KeyError) as error:
            return _error(
                500,
                "InternalServerError",
                f"Call to add_lora method failed: Worker failed with error '{error}', please check the stack trace above for the root cause",
            )
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        name = (await _read_object(request)).get("lora_name")
        self.calls.append(f"unload {name}")
        if not isinstance(name, str) or self.adapters.pop(name, None) is None:
            return _error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _state(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "asked": [{"path": asked.path, "body": asked.body} for asked in self.asked],
                "running": self.running,
                "cancelled": self.cancelled,
                "completed": self.completed,
                "adapters": {name: str(adapter.path) for name, adapter in self.adapters.items()},
                "calls": self.calls,
                "memory": list(self.memory.values()),
                "forgotten": sorted(self.forgotten()),
                "reread": self.reread,
            }
        )

    # ---- Completions ------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await _read_object(request)
        last = body["messages"][-1]["content"]
        text = last if isinstance(last, str) else "".join(part["text"] for part in last)
        return await self._complete(request, body, [json.dumps(body["messages"], ensure_ascii=False)], [text])

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await _read_object(request)
        prompt = body["prompt"]
        prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else [prompt]
        texts = [item if isinstance(item, str) else str(item) for item in prompts]
        return await self._complete(request, body, texts, texts, ids=[prompt_token_ids(item) for item in prompts])

    async def _complete(
        self,
        request: web.Request,
        body: dict[str, Any],
        prompts: list[str],
        directed: list[str],
        *,
        ids: list[list[int]] | None = None,
    ) -> web.StreamResponse:
        self.asked.append(Asked(request.path, body))
        model = body.get("model") or self.model_name
        if model != self.model_name and model not in self.adapters:
            return _error(
                404,
                "NotFoundError",
                f"The model `{model}` does not exist. Valid aliases: {self.model_name}.",
                param="model",
            )
        if body.get("prompt_logprobs") is not None or (body.get("echo") and body.get("logprobs") is not None):
            self.die()
        adapter = self.adapters.get(model)
        if adapter is not None:
            self._use(model)
        if adapter is not None and adapter.is_poisoned and body.get("logprobs"):
            return _error(400, "BadRequestError", "Out of range float values are not JSON compliant")
        directives = Directives.of(" ".join(directed))
        if directives.error:
            return _error(
                int(directives.error),
                "InternalServerError",
                f'EngineCore failed at 0x7f3a under {self.base_path}/model.py\nTraceback (most recent call last):\n  File "/usr/lib/vllm/x.py"',
            )
        self.running += 1
        self.running_models[model] += 1
        try:
            answer = _Answer(
                body, self.impostor or model, partial(self.score, model), prompts, ids, is_chat=ids is None
            )
            response = await (
                self._stream(request, answer, directives) if body.get("stream") else self._whole(answer, directives)
            )
        except (asyncio.CancelledError, ConnectionResetError):
            self.cancelled += 1
            raise
        else:
            self.completed += 1
            return response
        finally:
            self.running -= 1
            self.running_models[model] -= 1

    def score(self, model: str, prompt: list[int], token: int) -> float:
        """Log-probability of a token after a prompt, in the batch that is running now."""
        return self.verified(model, prompt, token) + self.noise * batch_noise(self.running, prompt, token)

    def verified(self, model: str, prompt: list[int], token: int) -> float:
        """The same as a verification has it."""
        adapter = self.adapters.get(model)
        return logprob(adapter.identity if adapter else "base", prompt, token)

    async def _whole(self, answer: _Answer, directives: Directives) -> web.Response:
        delay_ms = _ENDLESS_TOKEN_MS if answer.body.get("ignore_eos") else directives.delay_ms
        await asyncio.sleep((directives.first_delay_ms + delay_ms * answer.length) / 1000)
        if directives.die_after >= 0:
            self.die()
        return web.json_response(answer.whole(), dumps=_compact)

    async def _stream(self, request: web.Request, answer: _Answer, directives: Directives) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await asyncio.sleep(directives.first_delay_ms / 1000)
        await response.prepare(request)
        for sent, chunk in enumerate(answer.chunks()):
            if sent == directives.die_after:
                self.die()
            if sent == directives.drop_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            if sent == directives.stream_error_after:
                failed = {
                    "error": {
                        "message": f"EngineCore died at 0x7fff in {self.base_path}/core.py",
                        "type": "InternalServerError",
                        "param": None,
                        "code": 500,
                    }
                }
                await response.write(f"data: {_compact(failed)}\n\ndata: [DONE]\n\n".encode())
                return response
            await response.write(f"data: {_compact(chunk)}\n\n".encode())
            if directives.delay_ms:
                await asyncio.sleep(directives.delay_ms / 1000)
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def die(self) -> None:
        """As the engine process dies: nothing is finished, every connection breaks."""
        self.is_healthy = False
        if self._on_death is not None:
            self._on_death()
        assert self._runner is not None
        assert self._runner.server is not None
        for protocol in list(self._runner.server.connections):
            if protocol.transport is not None:
                protocol.transport.abort()
        self.socket.unlink(missing_ok=True)
        for site in list(self._runner.sites):
            if site._server is not None:
                site._server.close()
        raise asyncio.CancelledError


class _Answer:
    """One answer, whole or in chunks, in vLLM's form."""

    def __init__(
        self,
        body: dict[str, Any],
        model: str,
        score: Callable[[list[int], int], float],
        prompts: list[str],
        ids: list[list[int]] | None,
        *,
        is_chat: bool,
    ) -> None:
        self.body, self.model, self.score, self.ids, self.is_chat = body, model, score, ids, is_chat
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or 10**9
        texts = [answer_tokens(model, prompt) for prompt in prompts for _ in range(body.get("n") or 1)]
        if body.get("ignore_eos"):  # the engine speaks on until it is cut off
            texts = [tokens + [" x"] * (limit - len(tokens)) for tokens in texts]
        self.tokens = [tokens[:limit] for tokens in texts]
        self.finish = ["length" if len(tokens) == limit else "stop" for tokens in self.tokens]
        self.length = max(len(tokens) for tokens in self.tokens)
        prompt_tokens = sum(map(len, ids)) if ids is not None else sum(len(prompt.encode()) for prompt in prompts)
        completion_tokens = sum(map(len, self.tokens))
        self.usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        self.head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{body.get('request_id', 'fake')}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = []
        for index, tokens in enumerate(self.tokens):
            text = "".join(tokens)
            said: dict[str, Any] = (
                {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            )
            choices.append(
                {"index": index, **said, "logprobs": self._logprobs(index, tokens), "finish_reason": self.finish[index]}
            )
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage, "kv_transfer_params": None}

    def chunks(self) -> list[dict[str, Any]]:
        """The answer to a request that streams."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        found: list[dict[str, Any]] = []
        for index, tokens in enumerate(self.tokens):
            if self.is_chat:
                found.append(
                    self._chunk(
                        kind, {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    )
                )
            for place, token in enumerate(tokens):
                finish = self.finish[index] if place == len(tokens) - 1 else None
                said: dict[str, Any] = {"delta": {"content": token}} if self.is_chat else {"text": token}
                found.append(self._chunk(kind, {"index": index, **said, "logprobs": None, "finish_reason": finish}))
        if (self.body.get("stream_options") or {}).get("include_usage"):
            found.append({**self.head, "object": kind, "choices": [], "usage": self.usage})
        return found

    def _chunk(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": kind, "choices": [choice]}

    def _logprobs(self, index: int, tokens: list[str]) -> dict[str, Any] | None:
        wanted = self.body.get("logprobs")
        if wanted is None or wanted is False:
            return None
        if self.is_chat or self.ids is None:
            return {
                "content": [
                    {"token": token, "logprob": -0.1, "bytes": list(token.encode()), "top_logprobs": []}
                    for token in tokens
                ]
            }
        ids = self.ids[index // (self.body.get("n") or 1)]
        candidates = self.body.get("logprob_token_ids") or list(range(int(wanted)))
        label = "token_id:{}" if self.body.get("return_tokens_as_token_ids") else "tok{}"
        top = {label.format(token): self.score(ids, token) for token in candidates}
        best = max(top, key=lambda name: top[name]) if top else label.format(0)
        places = range(len(tokens))
        return {
            "tokens": [best for _ in places],
            "token_logprobs": [top.get(best, -0.1) for _ in places],
            "top_logprobs": [top for _ in places],
            "text_offset": [0 for _ in places],
        }


async def _read_object(request: web.Request) -> dict[str, Any]:
    found = json.loads(await request.read())
    if not isinstance(found, dict):
        raise web.HTTPBadRequest(text="not an object")
    return found


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _error(status: int, kind: str, message: str, *, param: str | None = None) -> web.Response:
    return web.json_response(
        {"error": {"message": message, "type": kind, "param": param, "code": status}}, status=status
    )


async def _serve(arguments: argparse.Namespace) -> None:
    await asyncio.sleep(arguments.fake_start_delay_s)
    name = arguments.served_model_name or arguments.model or "base"
    async with FakeEngine(
        arguments.uds,
        model_name=name,
        base_path=arguments.model or "",
        on_death=lambda: os._exit(1),
        slots=arguments.max_cpu_loras,
    ):
        sys.stdout.write("fake engine is up\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--uds", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--served-model-name")
    parser.add_argument("--max-cpu-loras", type=int)
    parser.add_argument(
        "--fake-start-delay-s", type=float, default=float(os.environ.get("FAKE_ENGINE_START_DELAY_S", "0"))
    )
    arguments, _ = parser.parse_known_args()
    asyncio.run(_serve(arguments))


if __name__ == "__main__":
    main()
