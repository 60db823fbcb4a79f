"""The door: a plain ASGI app in front of FastAPI. It decides on the path that is routed by, and denies by default.

Every request needs a key, whatever its path and method, but for `/healthz` and `/readyz`. Completions are answered here;
everything else goes on to FastAPI with its principal in the scope.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ..errors import Forbidden, GatewayError, Invalid, NotFound, Unavailable, quoted
from ..ids import new_id
from ..keys import Principal
from ..metrics import Metrics
from .asgi import SHOWED_KEY, App, Receive, Scope, Send, header
from .authentication import Authenticator
from .completions import PATHS, Completions
from .errors import render
from .exchange import Exchange

PRINCIPAL = "turnout.principal"
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
_RESPONSES = "/v1/responses"
# A host with one of these is read differently by different parsers (CVE-2026-48710): nothing is decided on it.
_BAD_HOST = re.compile(rb"[^A-Za-z0-9._:\[\]-]")
_LOOPBACK_HOST = re.compile(rb"^(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?$")
_LOOPBACK_ORIGIN = re.compile(rb"^https?://(localhost|127(\.[0-9]{1,3}){3}|\[::1\])(:[0-9]{1,5})?$")


class Lifecycle:
    """Whether the gateway takes requests, and how many it is answering."""

    def __init__(self) -> None:
        self.is_draining = False
        self.in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        """A request begins."""
        self.in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request has ended."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until nothing is being answered; False when that takes too long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self.in_flight == 0


class Front:
    """Check host and key, answer completions, hand the rest on."""

    def __init__(
        self,
        inner: App,
        completions: Completions,
        authenticator: Authenticator,
        lifecycle: Lifecycle,
        metrics: Metrics,
        *,
        loopback_only: bool,
        on_start: Callable[[], Awaitable[None]],
        on_stop: Callable[[], Awaitable[None]],
    ) -> None:
        self._inner = inner
        self._completions = completions
        self._authenticator = authenticator
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._loopback_only = loopback_only
        self._on_start = on_start
        self._on_stop = on_stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] in OPEN_PATHS:
            await self._inner(scope, receive, send)
        else:
            await self._counted(scope, receive, send)

    async def _counted(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._lifecycle.enter()
        self._metrics.in_flight.inc()
        try:
            try:
                principal = self._admit(scope)
            except GatewayError as error:
                await _send_error(error, send)
                return
            await self._dispatch(principal, scope, receive, send)
        finally:
            self._lifecycle.leave()
            self._metrics.in_flight.dec()

    def _admit(self, scope: Scope) -> Principal:
        """Who is asking; an error for everything that goes no further."""
        self._check_host(scope)
        principal = self._authenticator.principal(header(scope, b"authorization"))
        if SHOWED_KEY in scope:
            scope[SHOWED_KEY]()
        if self._lifecycle.is_draining:
            raise Unavailable("the gateway is stopping; try again", code="shutting_down")
        return principal

    def _check_host(self, scope: Scope) -> None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) > 1 or any(_BAD_HOST.search(host) for host in hosts):
            raise Invalid("the Host header is malformed", code="bad_host")
        if not self._loopback_only:
            return
        # Without keys the only guard is who can connect: a web page that a browser here shows must not be able to.
        if any(_LOOPBACK_HOST.match(host) is None for host in hosts):
            raise Forbidden("without keys this server answers to loopback names only", code="bad_host")
        origin = header(scope, b"origin")
        if origin is not None and _LOOPBACK_ORIGIN.match(origin) is None:
            raise Forbidden("without keys this server answers no other web site", code="bad_origin")

    async def _dispatch(self, principal: Principal, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        endpoint = PATHS.get(path)
        if endpoint is not None:
            if scope["method"] != "POST":
                await _send_error(_method_not_allowed(scope), send)
            else:
                await self._completions.answer(endpoint, Exchange(principal), scope, receive, send)
        elif path == _RESPONSES or path.startswith(_RESPONSES + "/"):
            await _send_error(
                NotFound(f"{quoted(path)} is not served; use /v1/chat/completions", code="unknown_url"), send
            )
        else:
            await self._inner({**scope, PRINCIPAL: principal}, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self._on_start()
        except GatewayError as error:
            await send({"type": "lifespan.startup.failed", "message": error.message})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._on_stop()
        await send({"type": "lifespan.shutdown.complete"})


def _method_not_allowed(scope: Scope) -> Invalid:
    return Invalid(f"{scope['path']} takes POST, not {scope['method']:.20}", code="method_not_allowed")


async def _send_error(error: GatewayError, send: Send) -> None:
    status, headers, body = render(error)
    headers.append((b"x-request-id", new_id("req-").encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
