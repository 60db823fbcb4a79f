"""uvicorn as the gateway runs it: it drains before it stops, and no client keeps it waiting or makes it remember too much."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable
from time import monotonic
from types import FrameType

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import Invalid
from .proxy.app import Lifecycle
from .proxy.asgi import App
from .settings import Settings

HEADERS_TIMEOUT_S = 30.0
# The first read may hold much of a body too, so the cap on headers is a generous one.
MAX_HEADER_BYTES = 2**20
_KEEP_ALIVE_S = 75
_CLOSE_TIMEOUT_S = 5
_TICKS_IN_A_SECOND = 10
# A peer that takes no byte for this long is cut off by the kernel, buffers and all.
_TCP_USER_TIMEOUT_MS = 60_000


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with the limits that it leaves out: on the size of headers and on the time they take."""

    _header_bytes = 0
    headers_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock of the first request runs from here."""
        super().connection_made(transport)
        self.headers_since = monotonic()

    def data_received(self, data: bytes) -> None:
        """Count what comes before the headers are whole; close beyond the cap."""
        if self.cycle is None or self.cycle.response_complete:
            if self._header_bytes == 0:
                self.headers_since = monotonic()
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self.transport.close()
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        """The request begins; the next one's headers start from nothing."""
        self._header_bytes = 0
        self.headers_since = None
        super().on_headers_complete()


class GatewayServer(uvicorn.Server):
    """Asked to stop, it refuses new requests and lets the open ones finish, up to a limit."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        lifecycle: Lifecycle,
        *,
        cut_all: Callable[[], None],
        headers_timeout_s: float = HEADERS_TIMEOUT_S,
        owns_process: bool = False,
    ) -> None:
        super().__init__(_config(app))
        self._lifecycle = lifecycle
        self._cut_all = cut_all
        self._drain_timeout_s = settings.drain_timeout_s
        self._drain_until: float | None = None
        self._headers_timeout_s = headers_timeout_s
        self._owns_process = owns_process

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start; then take what lives as long as the process out of the collector's rounds, which would stop all requests."""
        await super().startup(sockets)
        if self._owns_process:
            gc.collect()
            gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second stops, the third stops at once."""
        if self._drain_until is not None:
            super().handle_exit(sig, frame)
            return
        self._lifecycle.is_draining = True
        self._drain_until = monotonic() + self._drain_timeout_s

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: has everything been answered? Once a second: who has not said what it wants?"""
        if self._drain_until is not None and not self.should_exit:
            self._drain(self._drain_until)
        if counter % _TICKS_IN_A_SECOND == 0:
            self._close_stragglers()
        return await super().on_tick(counter)

    def _drain(self, until: float) -> None:
        if self._lifecycle.in_flight == 0:
            self.should_exit = True
        elif monotonic() >= until:
            self._cut_all()
            self.should_exit = True

    def _close_stragglers(self) -> None:
        oldest = monotonic() - self._headers_timeout_s
        for connection in list(self.server_state.connections):
            if not isinstance(connection, GuardedProtocol) or connection.timeout_keep_alive_task is not None:
                continue
            if connection.headers_since is not None and connection.headers_since < oldest:
                connection.transport.close()


def _config(app: App) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=GuardedProtocol,
        ws="none",
        lifespan="on",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_config=None,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
    )


def listening_socket(settings: Settings) -> socket.socket:
    """The bound socket; `Invalid` that says what to do when the address is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _TCP_USER_TIMEOUT_MS)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise Invalid(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; set TURNOUT_PORT to a free port",
            code="address_in_use",
            param="port",
        ) from error
    return bound
