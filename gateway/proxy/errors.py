"""The one table from error classes to HTTP, and OpenAI's form of an error body. FastAPI and the hot path share it."""

from __future__ import annotations

from typing import Any

import orjson

from ..errors import (
    Conflict,
    Forbidden,
    GatewayError,
    Invalid,
    NotFound,
    Refused,
    StorageFull,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UpstreamFailed,
)
from .asgi import Headers

STATUS: dict[type[GatewayError], int] = {
    Invalid: 400,
    Unauthenticated: 401,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    Refused: 422,
    UpstreamFailed: 502,
    Unavailable: 503,
    StorageFull: 507,
    GatewayError: 500,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout_error", 504: "timeout_error"}
# A code can be more exact than its class.
_STATUS_BY_CODE = {
    "request_timeout": 504,
    "body_timeout": 408,
    "unsupported_media_type": 415,
    "method_not_allowed": 405,
    "url_too_long": 414,
    "headers_too_large": 431,
}
_RETRY_AFTER_S = b"1"


def status_of(error: GatewayError) -> int:
    """The HTTP status of an error: by its code, else by its nearest class in the table."""
    by_code = _STATUS_BY_CODE.get(error.code)
    if by_code is not None:
        return by_code
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def error_body(status: int, message: str, *, code: str | None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""
    kind = _TYPES.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: GatewayError) -> dict[str, Any]:
    """The error's body."""
    return error_body(status_of(error), error.message, code=error.code, param=error.param)


def headers_of(error: GatewayError) -> Headers:
    """What an error adds to the headers: how to authenticate, when to come back."""
    status = status_of(error)
    if status == 401:
        return [(b"www-authenticate", b"Bearer")]
    if status == 503:
        return [(b"retry-after", _RETRY_AFTER_S)]
    return []


def render(error: GatewayError) -> tuple[int, Headers, bytes]:
    """Status, headers and body of a response that reports `error`."""
    body = orjson.dumps(body_of(error))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *headers_of(error),
    ]
    return status_of(error), headers, body


def sse_event(error: GatewayError) -> bytes:
    """The same as the last event of a stream that has begun; no `[DONE]` follows it."""
    return b"data: " + orjson.dumps(body_of(error)) + b"\n\n"
