"""uvicorn as the gateway runs it: it drains before it stops, and no client keeps it waiting."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable
from time import monotonic
from types import FrameType

import structlog
import uvicorn

from .connections.connection import Connection
from .connections.door import Door
from .connections.files import HOW_TO_RAISE, allowed_connections, file_limit
from .connections.room import size_of
from .handover import Offer, Place, handover_path
from .metrics import Metrics
from .proxy.app import Lifecycle
from .proxy.asgi import App
from .settings import Settings

log = structlog.get_logger(__name__)

HEADERS_TIMEOUT_S = 30.0
REFUSED_BODY_TIMEOUT_S = 60.0
_KEEP_ALIVE_S = 75
_CLOSE_TIMEOUT_S = 5
_TICKS_IN_A_SECOND = 10


class GatewayServer(uvicorn.Server):
    """Asked to stop, it refuses new requests and lets the open ones finish, up to a limit."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        lifecycle: Lifecycle,
        metrics: Metrics,
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
        self._handover_path = handover_path(settings)
        self._place: Place | None = None
        self._listening: list[socket.socket] = []
        self._offer: Offer | None = None
        files, wanted = file_limit().soft, settings.limits.connections
        total = allowed_connections(wanted, files)
        if owns_process and total < wanted:
            log.warning(f"fewer connections than set; {HOW_TO_RAISE}", connections=total, wanted=wanted, files=files)
        self._door = Door(size_of(total, settings.limits.connections_per_address), metrics)

    async def serve_at(self, place: Place) -> None:
        """Serve until told to stop, on a socket that is taken when everything else is up."""
        self._place = place
        await self.serve()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; then take what lives as long as the process out of the collector's rounds, which would stop all requests."""
        if not sockets and self._place is None:
            raise ValueError("the server listens on sockets that it is given: see listening_socket()")
        await super().startup([])
        self._listening = list(sockets or [])
        if not self._listening and self._place is not None:
            self._listening = [await self._taken(self._place)]
        self._door.open(self._listening, self._connection, backlog=self.config.backlog)
        if self._owns_process:
            gc.collect()
            gc.freeze()

    async def _taken(self, place: Place) -> socket.socket:
        try:
            return await asyncio.to_thread(place.take)
        except BaseException:
            await self.lifespan.shutdown()
            raise

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state, self._door)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Nobody comes in any more; then everything ends."""
        self._door.close()
        for listening in self._listening:
            listening.close()
        if self._offer is not None:  # after that: who was promised the address finds it free
            self._offer.close()
        await super().shutdown(sockets)

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
            self._door.tell(monotonic())
        return await super().on_tick(counter)

    def _drain(self, until: float) -> None:
        if self._offer is None and self._owns_process and self._listening:
            self._offer = Offer(self._handover_path, self._listening[0], given=self._hand_over)
        if self._lifecycle.in_flight == 0:
            self.should_exit = True
        elif monotonic() >= until:
            self._cut_all()
            self.should_exit = True

    def _hand_over(self) -> None:
        """The next gateway accepts from now on; clients that keep a connection here are to make a new one."""
        log.info("the next gateway listens; the open answers end here", in_flight=self._lifecycle.in_flight)
        self._door.hand_over()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.retire()

    def _close_stragglers(self) -> None:
        clock = monotonic()
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection) and connection.is_late(
                clock,
                headers_timeout_s=self._headers_timeout_s,
                refused_body_timeout_s=self._refused_body_timeout_s,
            ):
                connection.cut()


def _config(app: App) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,  # uvicorn makes none: the door does
        ws="none",
        lifespan="on",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        log_config=None,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
    )
