"""Every error of the API in OpenAI's form. The table from class to status is `proxy.errors.STATUS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from ..errors import MAX_VALUE_CHARS, GatewayError
from ..metrics import Metrics
from ..proxy.errors import error_body, render

_SOURCES = ("body", "query", "path", "header")
MAX_TOLD = 10
_MAX_PLACE = 120

log = structlog.get_logger(__name__)


def install_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Make every failure of a handler an answer that says what to do."""

    async def unhandled(request: Request, error: Exception) -> Response:
        log.error("handler failed", path=request.url.path, method=request.method, exc_info=error)
        metrics.unhandled.labels("api").inc()
        return _response(500, error_body(500, "the gateway failed; the cause is in its log", code="internal_error"))

    app.add_exception_handler(GatewayError, _on_gateway_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, unhandled)


async def _on_gateway_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, GatewayError):
        raise error
    status, headers, body = render(error)
    shown = {name.decode(): value.decode() for name, value in headers if name != b"content-length"}
    return Response(body, status_code=status, headers=shown)


async def _on_validation_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    found = error.errors()
    told = [_in_words(one) for one in found[:MAX_TOLD]]
    more = f"; and {len(found) - MAX_TOLD:,} more" if len(found) > MAX_TOLD else ""
    message = "; ".join(f"{place or 'the body'}: {what}" for place, what in told) + more
    param = told[0][0] or None
    return _response(400, error_body(400, message, code="invalid_request", param=param))


def _in_words(error: Mapping[str, Any]) -> tuple[str, str]:
    """Where it is and what; never the value, which may be anything."""
    place = ".".join(str(part)[:_MAX_PLACE] for part in error["loc"] if part not in _SOURCES)
    return place[:_MAX_PLACE], str(error["msg"])[:MAX_VALUE_CHARS]


async def _on_http_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    if isinstance(error.__cause__, GatewayError):  # what stopped FastAPI's reading of the body
        return await _on_gateway_error(request, error.__cause__)
    message, code = str(error.detail), "http_error"
    if error.status_code == 404:
        message, code = f"unknown URL: {request.method} {request.url.path}"[:200], "unknown_url"
    elif error.status_code == 405:
        message, code = f"{request.url.path} does not take {request.method}"[:200], "method_not_allowed"
    return _response(error.status_code, error_body(error.status_code, message, code=code), error.headers)


def _response(status: int, body: dict[str, Any], headers: Any = None) -> Response:
    return Response(orjson.dumps(body), status_code=status, media_type="application/json", headers=headers)
