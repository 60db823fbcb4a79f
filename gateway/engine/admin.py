"""The controller's own connection to an engine: health, adapters, log-probabilities. Clients' requests never come here."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import structlog

from ..errors import GatewayError, without_internals

log = structlog.get_logger(__name__)

# Against a connection that is lost and nobody tells of. Whether an engine hangs is the pulse's to say, by what it does and
# not by the time that it takes: on a busy machine one answer in company may take minutes.
_READ_TIMEOUT_S = 900.0
_LOAD_TIMEOUT_S = 900.0
_MAX_REASON = 500
_MAX_LOGGED = 4_000
# Counters that grow whenever the engine's core does any work for anybody.
_WORK = re.compile(r"^vllm:(?:prompt_tokens_total|generation_tokens_total)(?:\{[^}]*\})? (\S+)", re.MULTILINE)


class EngineUnreachable(GatewayError):
    """No answer, or a connection that broke: nothing is known of what the engine did."""

    code = "engine_unreachable"


class EngineFailed(EngineUnreachable):
    """The engine answered that it failed: it may be dying, or this one request is more than it can do."""

    code = "engine_failed"


class EngineRefused(GatewayError):
    """The engine answered that it will not; trying the same again is pointless."""

    code = "engine_refused"

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message[:_MAX_REASON])
        self.status = status


class NotFinite(GatewayError):
    """The engine computed numbers that are no numbers."""

    code = "non_finite"

    def __init__(self, model: str) -> None:
        super().__init__(f"{model} gives log-probabilities that are not finite")
        self.model = model


class EngineAdmin:
    """Calls on one engine's Unix socket. Use it within one process start of the engine, then close it."""

    def __init__(self, socket: str, base_model: str) -> None:
        self.socket = socket
        self.base_model = base_model
        self._session: aiohttp.ClientSession | None = None
        self._has_answered = False
        self._silent_since: dict[str, float] = {}  # by call, monotonic

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def is_healthy(self, timeout_s: float) -> bool:
        """Whether the server says that its core lives. Raises `EngineUnreachable` when it says nothing in time."""
        status, _ = await self._call("GET", "/health", timeout_s=timeout_s)
        return status == 200

    async def models(self) -> dict[str, str]:
        """Loaded adapters: name -> path."""
        status, text = await self._call("GET", "/v1/models")
        if status != 200:
            raise EngineUnreachable(f"the engine cannot list its models: status {status}")
        return {card["id"]: card["root"] for card in json.loads(text)["data"] if card.get("parent")}

    async def load(self, name: str, directory: Path) -> None:
        """Load an adapter under a name that was never used before. Raises `EngineRefused` with the engine's own words."""
        # `load_inplace` is never sent: it is not atomic, and it sticks to the request.
        body = {"lora_name": name, "lora_path": str(directory)}
        status, text = await self._call("POST", "/v1/load_lora_adapter", body, timeout_s=_LOAD_TIMEOUT_S)
        if status != 200:
            raise EngineRefused(_message(text), status=status)

    async def unload(self, name: str) -> None:
        """Unload an adapter; nothing happens when it is not there. Requests that it is answering go on."""
        status, text = await self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if status not in (200, 404):
            raise EngineRefused(_message(text), status=status)

    async def first_token(self, model: str, prompt: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """Log-probability of each candidate as the next token. Raises `NotFinite`."""
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": len(candidates),
            "logprob_token_ids": list(candidates),
            "return_tokens_as_token_ids": True,
        }
        choice = await self._complete(body)
        found = choice["logprobs"]["top_logprobs"][0]
        values = [float(found[f"token_id:{candidate}"]) for candidate in candidates]
        if not all(math.isfinite(value) for value in values):
            raise NotFinite(model)
        return values

    async def generate(
        self, model: str, prompt: Sequence[int], *, max_tokens: int, timeout_s: float = _READ_TIMEOUT_S
    ) -> str:
        """Greedy text of up to `max_tokens` tokens, whatever they are."""
        body = {"model": model, "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        return str((await self._complete(body, timeout_s=timeout_s))["text"])

    async def work_done(self, timeout_s: float = _READ_TIMEOUT_S) -> float | None:
        """Tokens that the engine has processed since its start; None when it does not say."""
        status, text = await self._call("GET", "/metrics", timeout_s=timeout_s)
        values = [float(value) for value in _WORK.findall(text)] if status == 200 else []
        return sum(values) if values else None

    async def _complete(self, body: dict[str, Any], *, timeout_s: float = _READ_TIMEOUT_S) -> dict[str, Any]:
        status, text = await self._call("POST", "/v1/completions", body, timeout_s=timeout_s)
        if status == 400 and "Out of range float" in text:
            raise NotFinite(body["model"])
        if status >= 500:
            raise EngineFailed(f"the engine failed a request: {_message(text)}"[:_MAX_REASON])
        if status != 200:
            raise EngineRefused(_message(text), status=status)
        choice: dict[str, Any] = json.loads(text)["choices"][0]
        return choice

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = _READ_TIMEOUT_S
    ) -> tuple[int, str]:
        if self._session is None:
            self._session = aiohttp.ClientSession(connector=aiohttp.UnixConnector(self.socket, limit=0))
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.request(method, f"http://engine{path}", json=body, timeout=timeout) as answer:
                status, text = answer.status, await answer.text()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            fault = _fault(error, timeout_s)
            self._note_silence(f"{method} {path}", fault)
            raise EngineUnreachable(f"{method} {path}: {fault}") from error
        self._note_answer(f"{method} {path}")
        return status, text

    def _note_silence(self, call: str, fault: str) -> None:
        """Told once for as long as it lasts. Before its first answer an engine starts: whoever waits for it tells that."""
        if self._has_answered and call not in self._silent_since:
            self._silent_since[call] = time.monotonic()
            log.warning("engine does not answer", call=call, fault=fault)

    def _note_answer(self, call: str) -> None:
        self._has_answered = True
        since = self._silent_since.pop(call, None)
        if since is not None:
            log.info("engine answers again", call=call, after_s=round(time.monotonic() - since, 1))


def _fault(error: Exception, timeout_s: float) -> str:
    """What went wrong between us and the engine, in words that name no class of a library."""
    match error:
        case TimeoutError():
            return f"no answer within {timeout_s:g} s"
        case aiohttp.ClientConnectorError() | FileNotFoundError() | ConnectionRefusedError():
            return "nothing listens on its socket"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() | OSError():
            return "the connection broke"
        case _:
            return "its answer cannot be read"


def _message(text: str) -> str:
    """The engine's sentence as anybody may read it; the log has its very words."""
    told = _told(text)
    message = without_internals(told, "its own words are in the controller's log")
    if message != told:
        log.warning("engine's words withheld", words=told[:_MAX_LOGGED])
    return message


def _told(text: str) -> str:
    """The sentence, out of whichever form it has."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    if isinstance(found, dict):
        error = found.get("error", found)
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return str(error["message"])
    return text
