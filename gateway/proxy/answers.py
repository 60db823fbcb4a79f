"""Answers of an engine, made fit for the client: the name it asked for, no names or paths of ours, nothing false.

Streams pass as bytes; an event is parsed only when it holds something the gateway must know or hide.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from ..errors import GatewayError, Invalid, Unavailable, UpstreamFailed, without_internals

MAX_EVENT_BYTES = 8 * 2**20
_DONE = b"[DONE]"
_EVENT_END = b"\n\n"
# Quotes inside a JSON string are escaped, so these can only be the structure itself, never text of an answer.
_NOTABLE = re.compile(rb'"usage":\{|"error":|"finish_reason":"|\[DONE\]')
_CONTEXT = re.compile(r"maximum context length|max_model_len|longer than the maximum", re.IGNORECASE)
_PARAM = re.compile(r"^[a-z_][a-z0-9_.\[\]]{0,60}$")


class Seen:
    """What the gateway learned of an answer on its way through."""

    __slots__ = ("completion_tokens", "finish_reason", "prompt_tokens")

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.finish_reason: str | None = None

    def take_usage(self, usage: dict[str, Any]) -> None:
        """Remember the engine's own counts."""
        self.prompt_tokens = usage.get("prompt_tokens")
        self.completion_tokens = usage.get("completion_tokens")

    def take_choices(self, choices: list[dict[str, Any]]) -> None:
        """Remember why the answer ended."""
        for choice in choices:
            reason = choice.get("finish_reason")
            if reason is not None:
                self.finish_reason = str(reason)[:20]


def rewrite_whole(content: bytes, *, engine_name: str, asked_name: str, seen: Seen) -> bytes:
    """The answer to a request that does not stream, under the name the client used."""
    try:
        answer = orjson.loads(content)
        _check_model(answer["model"], engine_name)
        seen.take_choices(answer["choices"])
        seen.take_usage(answer["usage"])
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UpstreamFailed("the engine's answer is not a completion; try again", code="bad_engine_answer") from error
    answer["model"] = asked_name
    answer.pop("kv_transfer_params", None)
    return orjson.dumps(answer)


class StreamRewriter:
    """Server-sent events, fed as they come, given back as whole events."""

    def __init__(self, *, engine_name: str, asked_name: str, wants_usage: bool, seen: Seen) -> None:
        self._engine_name = engine_name
        self._asked_name = asked_name
        self._wants_usage = wants_usage
        self._seen = seen
        self._theirs = b'"model":%s,' % orjson.dumps(engine_name)
        self._ours = b'"model":%s,' % orjson.dumps(asked_name)
        self._rest = b""
        self.is_done = False

    def feed(self, data: bytes) -> bytes:
        """What may go to the client now. Raises `UpstreamFailed` when the engine reports an error or is not who it should be."""
        if self._rest:
            data = self._rest + data
        end = data.rfind(_EVENT_END)
        if end < 0:
            self._keep(data)
            return b""
        end += len(_EVENT_END)
        self._keep(data[end:])
        data = data[:end]
        if _NOTABLE.search(data) is None and data.count(self._theirs) == data.count(b"data: "):
            return data.replace(self._theirs, self._ours)
        return b"".join([self._event(event) for event in data.split(_EVENT_END) if event])

    def _keep(self, rest: bytes) -> None:
        if len(rest) > MAX_EVENT_BYTES:
            raise UpstreamFailed("the engine sent an event without end", code="bad_engine_answer")
        self._rest = rest

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b"data:"):
            return event + b"\n\n"
        payload = event[5:].strip()
        if payload == _DONE:
            self.is_done = True
            return b"data: [DONE]\n\n"
        try:
            chunk = orjson.loads(payload)
            return self._chunk(chunk)
        except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise UpstreamFailed(
                "the engine's stream is not a completion; try again", code="bad_engine_answer"
            ) from error

    def _chunk(self, chunk: dict[str, Any]) -> bytes:
        if "error" in chunk:
            raise UpstreamFailed("the engine failed while it was answering; try again", code="engine_error")
        _check_model(chunk["model"], self._engine_name)
        choices, usage = chunk["choices"], chunk.get("usage")
        self._seen.take_choices(choices)
        if usage is not None:
            self._seen.take_usage(usage)
            if not self._wants_usage:
                if not choices:
                    return b""
                del chunk["usage"]
        chunk["model"] = self._asked_name
        return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _check_model(found: Any, engine_name: str) -> None:
    if found != engine_name:
        raise UpstreamFailed("the engine answered as another model than it was asked for", code="wrong_model")


def engine_error(status: int, content: bytes, *, engine_name: str, asked_name: str) -> GatewayError:
    """What a client is told of an engine's refusal or failure: no path, no address, no trace, no name of ours."""
    if status == 404:
        return Unavailable(
            f"{asked_name!r} is not loaded on the engine yet; try again", code="version_not_loaded", param="model"
        )
    if status in (400, 413, 422):
        message, param = _their_words(content)
        message = message.replace(engine_name, asked_name)
        if "JSON compliant" in message:
            return UpstreamFailed("the model produced values that are not numbers", code="engine_error")
        if _CONTEXT.search(message):
            return Invalid(_clean(message), code="context_length_exceeded", param=param)
        return Invalid(_clean(message), code="engine_refused", param=param)
    if status in (429, 503):
        return Unavailable("the engine is overloaded; try again in a moment", code="engine_overloaded")
    return UpstreamFailed("the engine failed; try again", code="engine_error")


def _their_words(content: bytes) -> tuple[str, str | None]:
    try:
        error = orjson.loads(content)["error"]
        message, param = error["message"], error.get("param")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return "", None
    is_plain = isinstance(param, str) and _PARAM.match(param) is not None
    return str(message), param if is_plain else None


def _clean(message: str) -> str:
    return without_internals(message, "the engine refused the request as invalid")
