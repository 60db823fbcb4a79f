"""Connections from the data plane to engine replicas: HTTP/1.1 over Unix sockets, kept alive, pooled per replica.

Written on httptools because the hot path pays for every layer: a general client costs more than all else together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from time import monotonic
from typing import Any

import httptools

from ..errors import UpstreamFailed

# Shorter than the engine's own (5 s), so that a connection is never used in the moment the engine closes it.
_KEEP_ALIVE_S = 4.0
_CONNECT_TIMEOUT_S = 5.0
# Bytes kept for a reader that is slow; beyond, nothing more is read and the engine's own buffers fill.
_BUFFER_BYTES = 2**18
MAX_ANSWER_BYTES = 64 * 2**20


class EngineUnreachable(UpstreamFailed):
    """No connection to the engine: it has seen nothing of the request."""


class _Connection(asyncio.Protocol):
    """One connection, with at most one request on its way."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._parser: Any = None
        self._parts: deque[bytes] = deque()
        self._buffered = 0
        self._waiter: asyncio.Future[None] | None = None
        self._is_paused = False
        self._is_lost = False
        self.status = 0
        self.is_complete = True
        self.idle_since = 0.0

    # ---- asyncio's side

    def connection_made(self, transport: Any) -> None:
        """Keep the way to the engine."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer; anything that nobody asked for ends the connection."""
        if self.is_complete:
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """The engine closed it, or died."""
        self._is_lost = True
        self._wake()

    # ---- httptools' side

    def on_headers_complete(self) -> None:
        """The status is known."""
        self.status = self._parser.get_status_code()
        self._wake()

    def on_body(self, part: bytes) -> None:
        """Keep a part until it is read."""
        self._parts.append(part)
        self._buffered += len(part)
        if self._buffered > _BUFFER_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        """The answer is whole."""
        self.is_complete = True
        if not self._parser.should_keep_alive():
            self._is_lost = True
            self._transport.close()
        self._wake()

    # ---- the client's side

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent."""
        return (
            self.is_complete
            and not self._parts
            and not self._is_lost
            and not self._transport.is_closing()
            and monotonic() - self.idle_since < _KEEP_ALIVE_S
        )

    async def request(self, data: bytes) -> int:
        """Send a request; the status of its answer."""
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.is_complete = False
        self._transport.write(data)
        while not self.status:
            if self._is_lost:
                raise _broken()
            await self._wait()
        return self.status

    async def read(self) -> bytes:
        """All that has come since the last read, or what comes next; empty at the end."""
        while not self._parts:
            if self.is_complete:
                return b""
            if self._is_lost:
                raise _broken()
            await self._wait()
        data = self._parts.popleft() if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._buffered = 0
        if self._is_paused and not self._is_lost:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    def abort(self) -> None:
        """Close at once. The engine sees its client go, and stops working for it."""
        self._is_lost = True
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _broken() -> UpstreamFailed:
    return UpstreamFailed("the engine broke off its answer; try again", code="engine_error")


class EngineAnswer:
    """An answer whose status is known and whose body is still to be read."""

    __slots__ = ("_client", "_connection", "status")

    def __init__(self, client: EngineClient, connection: _Connection) -> None:
        self._client = client
        self._connection = connection
        self.status = connection.status

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes; `UpstreamFailed` when the engine breaks off."""
        while part := await self._connection.read():
            yield part

    async def read(self) -> bytes:
        """What is left of the body; `UpstreamFailed` when the engine breaks off or never stops."""
        parts: list[bytes] = []
        size = 0
        while part := await self._connection.read():
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise UpstreamFailed(f"the engine's answer is over {MAX_ANSWER_BYTES} bytes", code="bad_engine_answer")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> None:
        """Keep the connection if the answer was read to its end; else close it, which cancels the request."""
        self._client.give_back(self._connection)


class EngineClient:
    """One replica's completion routes. Nothing else of the engine is reachable through it."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.in_flight = 0
        self._idle: list[_Connection] = []
        self._is_closed = False
        self._heads = {path: _head(path) for path in ("/v1/chat/completions", "/v1/completions")}

    async def post(self, path: str, body: bytes) -> EngineAnswer:
        """Send a completion request; return when the engine has said its status.

        `EngineUnreachable` when there is no connection, `UpstreamFailed` when it breaks before the status.
        """
        connection = self._reused() or await self._connect()
        try:
            await connection.request(b"%s%d\r\n\r\n%s" % (self._heads[path], len(body), body))
        except BaseException:
            connection.abort()
            raise
        return EngineAnswer(self, connection)

    def give_back(self, connection: _Connection) -> None:
        """Keep a connection for the next request, if it can take one."""
        connection.idle_since = monotonic()
        if connection.is_reusable and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.abort()

    def _reused(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_unix_connection(_Connection, self.socket)
        except (OSError, TimeoutError) as error:
            raise EngineUnreachable("the engine cannot be reached; try again", code="engine_unreachable") from error
        return connection

    def close(self) -> None:
        """Close every connection that is idle; busy ones close when they are given back."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().abort()


def _head(path: str) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "host: engine", "content-type: application/json", "content-length: ")
    return "\r\n".join(lines).encode()


class EngineClients:
    """A client for each (replica, socket, epoch): an engine that was started anew never gets an old one's connections."""

    def __init__(self) -> None:
        self._clients: dict[tuple[str, str, str], EngineClient] = {}

    def client(self, replica_id: str, socket: str, epoch: str) -> EngineClient:
        """The replica's client."""
        key = (replica_id, socket, epoch)
        found = self._clients.get(key)
        if found is None:
            found = self._clients[key] = EngineClient(socket)
        return found

    def keep_only(self, replicas: Iterable[tuple[str, str, str]]) -> None:
        """Forget clients of replicas that are gone; what they are answering goes on."""
        wanted = set(replicas)
        for key in [key for key in self._clients if key not in wanted]:
            self._clients.pop(key).close()

    def close(self) -> None:
        """Close every client."""
        self.keep_only(())
