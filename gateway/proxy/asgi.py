"""ASGI as the hot path uses it: types, headers, a request's body read under a cap."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..errors import Invalid, TooLarge

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
_MAX_LENGTH_DIGITS = 18

# In the scope, where the server wants to know: called when a request has shown a key that counts. Raises `Unavailable`
# when the server has no room for one more.
SHOWED_KEY = "turnout.showed_key"


class ClientGone(Exception):
    """The client closed its connection."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a header; names are lower case already."""
    for found, value in scope["headers"]:
        if found == name:
            return bytes(value)
    return None


def declared_size(scope: Scope, *, max_bytes: int) -> int | None:
    """What `content-length` says; None of a chunked body. `TooLarge` before any of it is read."""
    declared = header(scope, b"content-length")
    if declared is None:
        return None
    if not declared.isdigit() or len(declared) > _MAX_LENGTH_DIGITS or int(declared) > max_bytes:
        raise over(max_bytes)
    return int(declared)


def check_encoding(scope: Scope) -> None:
    """Bodies come as they are: what a few compressed bytes unfold to, no cap could tell."""
    if header(scope, b"content-encoding") not in (None, b"identity"):
        raise Invalid("send the body uncompressed, without `content-encoding`", code="unsupported_media_type")


async def next_part(receive: Receive) -> tuple[bytes, bool]:
    """What comes next of a body, and whether more follows. `ClientGone` when it never comes."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int) -> bytes:
    """The whole of a small body, uncompressed. `TooLarge` beyond the cap, `ClientGone` when it never comes."""
    declared_size(scope, max_bytes=max_bytes)
    check_encoding(scope)
    parts: list[bytes] = []
    more, size = True, 0
    while more:
        part, more = await next_part(receive)
        size += len(part)
        if size > max_bytes:
            raise over(max_bytes)
        parts.append(part)
    return b"".join(parts)


class BoundedBody:
    """`receive` for handlers that read a body themselves: until it is whole it must come in time, and not be too much.

    With a cap the time is for all of it. An upload has caps of its own and may take long, so its time is for each part.
    """

    def __init__(self, receive: Receive, *, timeout_s: float, max_bytes: int | None) -> None:
        self._receive = receive
        self._timeout_s = timeout_s
        self._max_bytes = max_bytes
        self._clock = asyncio.get_running_loop().time
        self._deadline = self._clock() + timeout_s
        self._size = 0
        self._is_whole = False

    async def __call__(self) -> Message:
        """The next message. Raises `TooLarge`, or `Invalid` when it is too late."""
        if self._is_whole:
            return await self._receive()
        if self._max_bytes is None:
            self._deadline = self._clock() + self._timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            raise late() from error
        self._is_whole = not message.get("more_body", False)
        self._size += len(message.get("body", b""))
        if self._max_bytes is not None and self._size > self._max_bytes:
            raise over(self._max_bytes)
        return message


def late() -> Invalid:
    """The error of a body that does not come."""
    return Invalid("the body did not arrive in time", code="body_timeout")


def over(max_bytes: int) -> TooLarge:
    """The error of a body beyond its cap."""
    return TooLarge(f"the body is over the {max_bytes:,} bytes that are taken here", code="body_too_large")
