"""uvicorn as the gateway runs it: it drains before it stops, and no client keeps it waiting or makes it remember too much."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable, Sized
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .errors import Invalid
from .proxy.app import Lifecycle
from .proxy.asgi import App
from .settings import Settings

HEADERS_TIMEOUT_S = 30.0
# What a connection may send between bodies: headers, trailers, requests that wait for their turn. Up to one read more,
# for a read may hold the end of one request and the beginning of the next.
MAX_HEADER_BYTES = 2**20
MAX_WAITING_REQUESTS = 100
# A body that was answered before all of it had come is read on, so that its sender gets to read the answer: a client
# that is cut off while it sends sees a lost connection, and tries again. Nothing of it is kept. As much as the largest
# data file by default, and as long as 30 MB take at 5 Mbit/s; a sender that stops has read the answer, or never will.
MAX_REFUSED_BODY_BYTES = 512 * 2**20
REFUSED_BODY_TIMEOUT_S = 60.0
_REFUSED_BODY_PAUSE_S = 3.0
_KEEP_ALIVE_S = 75
_CLOSE_TIMEOUT_S = 5
_TICKS_IN_A_SECOND = 10
# A peer that takes no byte for this long is cut off by the kernel, buffers and all.
_TCP_USER_TIMEOUT_MS = 60_000


class _Unwanted(Exception):
    """Stops the parser; uvicorn takes it for a malformed request."""


class _Flow(FlowControl):
    """Reads no further while requests wait for their turn: each of those that are served would ask for more."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class _AnswerTransport:
    """The transport as an answer sees it. Closing it is the connection's business."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with what it leaves out: limits on what comes outside of bodies and on the time that headers
    take, and the reading of bodies that were answered early.
    """

    headers_since: float | None = None
    refused_since: float | None = None
    heard_at = 0.0  # of a refused body
    _outside_bytes = 0
    _refused_bytes = 0
    _has_progress = False
    _is_in_body = False
    _closes_after_body = False
    _answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock of the first request runs from here."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        self.headers_since = monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        """uvicorn tells the request that came last; the one that is being answered must know, and none is begun."""
        self.pipeline.clear()
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to no body, and what belongs to a refused one; close beyond the caps."""
        if self.refused_since is not None:
            self._refused_bytes += len(data)
            self.heard_at = monotonic()
        elif not self._is_in_body and (self._outside_bytes == 0 or self.headers_since is None):
            self.headers_since = monotonic()
        self._has_progress = False
        self._outside_bytes += len(data)
        super().data_received(data)
        if self._has_progress and not self.pipeline:
            self._outside_bytes = 0
        if self._outside_bytes > MAX_HEADER_BYTES or self._refused_bytes > MAX_REFUSED_BODY_BYTES:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Not into the middle of another answer, nor behind the one that a refused body has got."""
        answering = self._answering
        is_mid_answer = answering is not None and answering.response_started and not answering.response_complete
        if is_mid_answer or self.refused_since is not None or self.transport.is_closing():
            self.transport.close()
        else:
            super().send_400_response(msg)

    def on_headers_complete(self) -> None:
        """The request begins; the next one's headers start from nothing."""
        if self._closes_after_body or len(self.pipeline) >= MAX_WAITING_REQUESTS:
            raise _Unwanted
        self._has_progress = self._is_in_body = True
        self.headers_since = None
        self._unset_keepalive_if_required()
        super().on_headers_complete()
        self.cycle.transport = _AnswerTransport(self.transport, self._close_after_answer)  # type: ignore[assignment]

    def on_body(self, body: bytes) -> None:
        """Bodies have caps of their own."""
        self._has_progress = True
        self._outside_bytes -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole; after a refused one the connection is as good as new."""
        self._is_in_body = False
        super().on_message_complete()
        if self.refused_since is None:
            return
        self.refused_since = None
        self._refused_bytes = 0
        if self._closes_after_body:
            self.transport.close()
        elif self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """The next that waits has its turn; the rest of a body that is answered already is read and dropped."""
        had_waiting = bool(self.pipeline)
        super().on_response_complete()
        if had_waiting and not self.pipeline:
            self._outside_bytes = 0
        if self._is_in_body and self.cycle.response_complete:
            self.refused_since = self.heard_at = monotonic()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _close_after_answer(self) -> None:
        # With bytes unread, closing would reset the connection, and the client would lose the answer it has not read.
        if self._is_in_body and self.cycle.response_complete:
            self._closes_after_body = True
        else:
            self.transport.close()


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
        refused_body_timeout_s: float = REFUSED_BODY_TIMEOUT_S,
        owns_process: bool = False,
    ) -> None:
        super().__init__(_config(app))
        self._lifecycle = lifecycle
        self._cut_all = cut_all
        self._drain_timeout_s = settings.drain_timeout_s
        self._drain_until: float | None = None
        self._headers_timeout_s = headers_timeout_s
        self._refused_body_timeout_s = refused_body_timeout_s
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
        clock = monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, GuardedProtocol) and self._is_straggler(connection, clock):
                connection.transport.close()

    def _is_straggler(self, connection: GuardedProtocol, clock: float) -> bool:
        if connection.refused_since is not None:
            is_late = clock - connection.refused_since > self._refused_body_timeout_s
            return is_late or clock - connection.heard_at > _REFUSED_BODY_PAUSE_S
        if connection.timeout_keep_alive_task is not None or connection.headers_since is None:
            return False
        return clock - connection.headers_since > self._headers_timeout_s


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
