"""Answers of an engine, made fit for the client: the name it asked for, no names or paths of ours, nothing false.

Of a stream only completion chunks of this very answer go on, and `[DONE]` when the engine said it; comments and fields
that are no data are dropped. Most chunks have one known form and pass as bytes; whatever looks otherwise is parsed.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from ..errors import GatewayError, Invalid, Unavailable, UpstreamFailed, without_internals
from .events import Event, EventReader, EventTooLarge

_DONE = b"[DONE]"
_EVENT_END = b"\n\n"
_TEXT = rb'"(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt])*+"'
_NULLS = rb'(?:,"(?:logprobs|finish_reason|stop_reason|token_ids|prompt_token_ids|prompt_logprobs|reasoning|refusal|usage)":null)*+'
# Chunks that carry text and nothing else. Quotes inside a string are escaped, so that names and commas outside of strings
# can only be the structure itself.
_PLAIN_CHUNKS = re.compile(
    rb'(?:data: \{"id":' + _TEXT + rb',"object":"(?:chat\.completion\.chunk|text_completion)"'
    rb',"created":[0-9]{1,12}+,"model":' + _TEXT + rb',"choices":\[\{"index":[0-9]{1,4}+,'
    rb'(?:"delta":\{"content":'
    + _TEXT
    + _NULLS
    + rb'\}|"text":'
    + _TEXT
    + rb")"
    + _NULLS
    + rb"\}\]"
    + _NULLS
    + rb"\}\n\n)*+"
)
_REQUEST_ID = re.compile(r"req-[0-9a-z]+\Z")
_MAX_TOKENS = 2**31
_CONTEXT = re.compile(r"maximum context length|max_model_len|longer than the maximum", re.IGNORECASE)
_PARAM = re.compile(r"^[a-z_][a-z0-9_.\[\]]{0,60}$")
_NOT_A_COMPLETION = (orjson.JSONDecodeError, KeyError, TypeError, AttributeError)


class Seen:
    """What the gateway learned of an answer on its way through."""

    __slots__ = ("completion_tokens", "finish_reason", "prompt_tokens")

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.finish_reason: str | None = None

    def take_usage(self, usage: dict[str, Any]) -> None:
        """Remember the engine's own counts. `TypeError` when they are none."""
        self.prompt_tokens = _tokens(usage.get("prompt_tokens"))
        self.completion_tokens = _tokens(usage.get("completion_tokens"))

    def take_choices(self, choices: list[dict[str, Any]]) -> None:
        """Remember why the answer ended. `TypeError` when these are no choices."""
        if not isinstance(choices, list):
            raise TypeError("choices are a list")
        for choice in choices:
            reason = choice.get("finish_reason")
            if reason is not None:
                self.finish_reason = str(reason)[:20]


def _tokens(count: Any) -> int | None:
    # What is no count would fail later, in metrics and in the record of exposures.
    if count is None or (type(count) is int and 0 <= count < _MAX_TOKENS):
        return count
    raise TypeError("a number of tokens is a number")


def rewrite_whole(
    content: bytes, *, engine_name: str, asked_name: str, seen: Seen, request_id: str | None = None
) -> bytes:
    """The answer to a request that does not stream, under the name the client used."""
    try:
        answer = orjson.loads(content)
        _check_model(answer["model"], engine_name)
        _check_request(answer.get("id"), request_id)
        seen.take_choices(answer["choices"])
        seen.take_usage(answer["usage"])
        answer["model"] = asked_name
        answer.pop("kv_transfer_params", None)
        return orjson.dumps(answer)
    except _NOT_A_COMPLETION as error:
        raise UpstreamFailed("the engine's answer is not a completion; try again", code="bad_engine_answer") from error


class StreamRewriter:
    """Server-sent events, fed as they come, given back as whole events."""

    def __init__(
        self, *, engine_name: str, asked_name: str, wants_usage: bool, seen: Seen, request_id: str | None = None
    ) -> None:
        self._engine_name = engine_name
        self._asked_name = asked_name
        self._wants_usage = wants_usage
        self._seen = seen
        self._request_id = request_id
        self._theirs = b'"model":%s,' % orjson.dumps(engine_name)
        self._ours = b'"model":%s,' % orjson.dumps(asked_name)
        self._events = EventReader()
        # Of the first chunk; all others must have the same.
        self._id: Any = None
        self._id_field: bytes | None = None
        self.is_done = False
        # Whether anything came behind `[DONE]`.
        self.has_surplus = False

    def feed(self, data: bytes) -> bytes:
        """What may go to the client now. Raises `UpstreamFailed` when the engine reports an error or is not who it should be."""
        passed: list[bytes] = []
        if self._id_field is None:
            # Only the first chunk is looked into for what all chunks share.
            first, end, data = data.partition(_EVENT_END)
            passed = self._pass(first + end)
        passed += self._pass(data)
        return passed[0] if len(passed) == 1 else b"".join(passed)

    def _pass(self, data: bytes) -> list[bytes]:
        if self.is_done:
            self.has_surplus = self.has_surplus or bool(data)
            return []
        end = self._plain_until(data)
        passed = [data[:end].replace(self._theirs, self._ours)] if end else []
        return passed + self._parsed(data[end:]) if end < len(data) else passed

    def _plain_until(self, data: bytes) -> int:
        """Where the chunks end, at the beginning of `data`, that need no look inside: of the known form, and of this answer."""
        if self._id_field is None or not self._events.is_between:
            return 0
        match = _PLAIN_CHUNKS.match(data)
        end = match.end() if match is not None else 0
        count = data.count(_EVENT_END, 0, end)
        is_ours = data.count(self._theirs, 0, end) == count == data.count(self._id_field, 0, end)
        return end if is_ours and _is_text(data[:end]) else 0

    def _parsed(self, data: bytes) -> list[bytes]:
        try:
            events = self._events.feed(data)
        except EventTooLarge as error:
            raise UpstreamFailed("the engine sent an event without end", code="bad_engine_answer") from error
        passed = []
        for number, event in enumerate(events, start=1):
            passed.append(self._event(event))
            if self.is_done:
                self.has_surplus = number < len(events) or not self._events.is_between
                break
        return passed

    def _event(self, event: Event) -> bytes:
        if event.kind == b"error":
            raise _failed_midway()
        payload = event.data.strip()
        try:
            if payload == _DONE:
                return self._done()
            return self._chunk(orjson.loads(payload))
        except _NOT_A_COMPLETION as error:
            raise UpstreamFailed(
                "the engine's stream is not a completion; try again", code="bad_engine_answer"
            ) from error

    def _done(self) -> bytes:
        if self._id_field is None:
            raise TypeError("a completion has at least one chunk")
        self.is_done = True
        return b"data: [DONE]\n\n"

    def _chunk(self, chunk: dict[str, Any]) -> bytes:
        if "error" in chunk:
            raise _failed_midway()
        _check_model(chunk["model"], self._engine_name)
        self._check_id(chunk.get("id"))
        choices, usage = chunk["choices"], chunk.get("usage")
        self._seen.take_choices(choices)
        if not all(isinstance(choice.get("delta"), dict) or isinstance(choice.get("text"), str) for choice in choices):
            raise TypeError("a choice says something")
        if usage is not None:
            self._seen.take_usage(usage)
            if not self._wants_usage:
                if not choices:
                    return b""
                del chunk["usage"]
        chunk["model"] = self._asked_name
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def _check_id(self, found: Any) -> None:
        if self._id_field is None:
            _check_request(found, self._request_id)
            self._id = found
            self._id_field = b'"id":%s,' % orjson.dumps(found)
        elif found != self._id:
            raise _answers_another()


def _is_text(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _failed_midway() -> UpstreamFailed:
    return UpstreamFailed("the engine failed while it was answering; try again", code="engine_error")


def _answers_another() -> UpstreamFailed:
    return UpstreamFailed("the engine answered another request than it was asked; try again", code="wrong_answer")


def _check_request(found: Any, request_id: str | None) -> None:
    """An engine's id of an answer ends in the id of the request. One that ends in another's is somebody else's answer."""
    if request_id is None or not isinstance(found, str):
        return
    named = _REQUEST_ID.search(found)
    if named is not None and named[0] != request_id:
        raise _answers_another()


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
    except _NOT_A_COMPLETION:
        return "", None
    is_plain = isinstance(param, str) and _PARAM.match(param) is not None
    return str(message), param if is_plain else None


def _clean(message: str) -> str:
    return without_internals(message, "the engine refused the request as invalid")
