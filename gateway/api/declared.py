"""Routes that say who may call them and what they take, so that both are checked before a byte of a body is read.

FastAPI reads and parses the body first and asks its dependencies afterwards: whoever may not call a route could still
make the gateway work for it. So every router here is made with `route_class=DeclaredRoute`; a test walks all routes.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Literal

import orjson
from fastapi import Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from ..errors import Invalid
from ..keys import Scope
from ..proxy.app import OPEN_PATHS
from ..proxy.asgi import BoundedBody, ClientGone, Message, declared_size, read_body
from .dependencies import NEEDED_SCOPE, principal_of, services

Takes = Literal["nothing", "json", "form"]
MAX_JSON_BYTES = 64 * 2**10
# Fields, items and what is in them. Each may become an error of its own, and an error costs a thousand times its bytes.
MAX_ELEMENTS = 1_024


class DeclaredRoute(APIRoute):
    """A route with its scope and the kind of its body; one that names no caller is open, and must be known to be."""

    scope: Scope | None
    takes: Takes

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler behind the checks."""
        handle = super().get_route_handler()
        needs = [NEEDED_SCOPE[one.call] for one in _dependencies(self.dependant) if one.call in NEEDED_SCOPE]
        if not needs and self.path not in OPEN_PATHS:
            raise TypeError(f"{self.path} names no caller: add a parameter of type Caller, Trainer or Admin")
        self.scope = next((scope for scope in needs if scope is not None), None)
        self.takes = self._takes()

        async def checked(request: Request) -> Response:
            if needs:
                principal = principal_of(request)
                for scope in needs:
                    if scope is not None:
                        principal.require(scope)
            return await handle(await _bounded(request, self.takes))

        return checked

    def _takes(self) -> Takes:
        declared = (self.openapi_extra or {}).get("requestBody", {}).get("content", {})
        if "multipart/form-data" in declared:
            return "form"
        return "json" if self.body_field is not None else "nothing"


def _dependencies(dependant: Dependant) -> list[Dependant]:
    return [one for child in dependant.dependencies for one in (child, *_dependencies(child))]


class _JsonRequest(Request):
    """A request whose body has been read; it is parsed strictly, if FastAPI asks for it."""

    def __init__(self, request: Request, content: bytes) -> None:
        super().__init__(request.scope, _nothing_more)
        self._content = content

    async def body(self) -> bytes:
        """What was read."""
        return self._content

    async def json(self) -> Any:
        """What it says."""
        return parse_json(self._content)


async def _nothing_more() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _bounded(request: Request, takes: Takes) -> Request:
    """The request with no more body than the route takes, and none of it late."""
    _check_query(request)
    if takes == "nothing":
        declared_size(request.scope, max_bytes=MAX_JSON_BYTES)
        return request
    timeout_s = services(request).body_timeout_s
    if takes == "form":  # its parts have caps of their own
        return Request(request.scope, BoundedBody(request.receive, timeout_s=timeout_s, max_bytes=None))
    receive = BoundedBody(request.receive, timeout_s=timeout_s, max_bytes=MAX_JSON_BYTES)
    try:
        return _JsonRequest(request, await read_body(request.scope, receive, max_bytes=MAX_JSON_BYTES))
    except ClientGone as error:
        raise Invalid("the connection closed before the whole body had arrived", code="body_incomplete") from error


def _check_query(request: Request) -> None:
    if b"%00" in request.scope["query_string"] or "\0" in request.scope["path"]:
        raise Invalid("the URL holds a NUL character, which no name has; leave it out", code="bad_character")


def parse_json(content: bytes) -> Any:
    """A small body. Raises `Invalid` for what is no JSON by the standard, has too many elements, or a NUL in a text."""
    try:
        value = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise Invalid(f"the body is not JSON: {error}"[:200], code="invalid_json") from error
    _check_elements(value)
    return value


def _check_elements(value: Any) -> None:
    unseen, seen = [value], 0
    while unseen:
        item = unseen.pop()
        inner = [*item.keys(), *item.values()] if isinstance(item, dict) else item if isinstance(item, list) else []
        seen += len(inner)
        if seen > MAX_ELEMENTS:
            raise Invalid(
                f"the body has more than {MAX_ELEMENTS:,} elements; no request here needs as many", code="too_many"
            )
        if isinstance(item, str) and "\0" in item:
            # PostgreSQL keeps no such text.
            raise Invalid("a text in the body holds a NUL character; leave it out", code="bad_character")
        unseen += inner
