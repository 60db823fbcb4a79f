"""ASGI as the hot path uses it: types, headers, a request's body read under a cap."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..errors import Invalid, TooLarge

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


class ClientGone(Exception):
    """The client closed its connection."""


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a header; names are lower case already."""
    for found, value in scope["headers"]:
        if found == name:
            return bytes(value)
    return None


def check_declared_size(scope: Scope, *, max_bytes: int) -> None:
    """Refuse a body by its `content-length`, before any of it is read."""
    declared = header(scope, b"content-length")
    if declared is not None and not (declared.isdigit() and int(declared) <= max_bytes):
        raise over(max_bytes)


async def read_body(scope: Scope, receive: Receive, *, max_bytes: int) -> bytes:
    """The whole body, uncompressed. `TooLarge` beyond the cap, `ClientGone` when it never comes."""
    check_declared_size(scope, max_bytes=max_bytes)
    if header(scope, b"content-encoding") not in (None, b"identity"):
        raise Invalid("send the body uncompressed, without `content-encoding`", code="unsupported_media_type")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise over(max_bytes)
        if not message.get("more_body", False):
            return b"".join([*parts, part]) if parts else part
        parts.append(part)


def over(max_bytes: int) -> TooLarge:
    """The error of a body beyond its cap."""
    return TooLarge(f"the body is over {max_bytes} bytes (setting limits.request_bytes)", code="body_too_large")
