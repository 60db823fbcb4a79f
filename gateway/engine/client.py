"""Connections from the data plane to engine replicas: HTTP/1.1 over Unix sockets, kept alive, pooled per replica.

Written for this one use because the hot path pays for every layer: a general client costs more than all else together.
No client may ever get a byte of another's answer. So a connection is used again only after an answer that ended where
its own framing says, with nothing behind it, and only while nothing has come since.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any

from ..errors import UpstreamFailed
from .framing import AnswerFraming, BadFraming

# Shorter than the engine's own (5 s), so that a connection is never used in the moment the engine closes it.
_KEEP_ALIVE_S = 4.0
_CONNECT_TIMEOUT_S = 5.0
# Bytes kept for a reader that is slow; beyond, nothing more is read and the engine's own buffers fill.
_BUFFER_BYTES = 2**18
MAX_ANSWER_BYTES = 64 * 2**20
MAX_REFUSAL_BYTES = 2**20


class EngineUnreachable(UpstreamFailed):
    """No connection to the engine: it has seen nothing of the request."""


class _Connection(asyncio.Protocol):
    """One connection, with at most one request on its way."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._poll = select.poll()
        # None until the first request.
        self._answer: AnswerFraming | None = None
        self._failure: UpstreamFailed | None = None
        self._buffered = 0
        self._waiter: asyncio.Future[None] | None = None
        self._is_paused = False
        self._is_lost = False
        self.idle_since = 0.0

    # ---- asyncio's side

    def connection_made(self, transport: Any) -> None:
        """Keep the way to the engine."""
        self._transport = transport
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer; anything that nobody asked for ends the connection."""
        answer = self._answer
        if answer is None or self.is_answered or self._is_lost:
            self.abort()
            return
        if not answer.status and self._transport.get_write_buffer_size():
            self._fail("it began before the request was sent")
            return
        try:
            answer.feed(data)
        except BadFraming as error:
            self._fail(str(error))
            return
        if answer.is_complete and (answer.has_surplus or not answer.keeps_open):
            self.abort()
            return
        self._buffered += len(data)
        if self._buffered > _BUFFER_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """The engine closed it, or died."""
        if error is None and self._answer is not None and not self._is_lost:
            self._answer.end()
        self._is_lost = True
        self._wake()

    # ---- the client's side

    @property
    def is_reusable(self) -> bool:
        """Whether another request may be sent: the answer is over and read, and nothing is known to have come since."""
        answer = self._answer
        return (
            answer is not None
            and answer.is_complete
            and not answer.parts
            and not self._is_lost
            and not self._transport.is_closing()
            and monotonic() - self.idle_since < _KEEP_ALIVE_S
        )

    @property
    def is_silent(self) -> bool:
        """Whether nothing waits unread: neither bytes that nobody asked for, nor the end of the connection."""
        return not self._poll.poll(0)

    @property
    def is_answered(self) -> bool:
        """Whether the answer has come to its end."""
        return self._answer is not None and self._answer.is_complete

    async def request(self, data: bytes) -> int:
        """Send a request; the status of its answer."""
        answer = self._answer = AnswerFraming()
        self._buffered = 0
        self._transport.write(data)
        while not answer.status:
            self._check()
            await self._wait()
        return answer.status

    async def read(self) -> bytes:
        """All that has come since the last read, or what comes next; empty at the end."""
        answer = self._answer
        if answer is None:
            return b""
        while not answer.parts:
            if answer.is_complete:
                return b""
            self._check()
            await self._wait()
        data = answer.parts[0] if len(answer.parts) == 1 else b"".join(answer.parts)
        answer.parts.clear()
        self._buffered = 0
        if self._is_paused and not self._is_lost:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    async def ended(self) -> None:
        """Wait for the end of the framing; returns early when more of the body comes."""
        answer = self._answer
        while answer is not None and not answer.is_complete and not answer.parts:
            self._check()
            await self._wait()

    def abort(self) -> None:
        """Close at once. The engine sees its client go, and stops working for it."""
        self._is_lost = True
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    def _fail(self, reason: str) -> None:
        self._failure = UpstreamFailed(
            f"the engine's answer is malformed ({reason}); try again", code="bad_engine_answer"
        )
        self.abort()

    def _check(self) -> None:
        if self._is_lost:
            raise self._failure or _broken()

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

    def __init__(self, client: EngineClient, connection: _Connection, status: int) -> None:
        self._client = client
        self._connection = connection
        self.status = status

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes; `UpstreamFailed` when the engine breaks off."""
        while part := await self._connection.read():
            yield part

    async def read(self, *, max_bytes: int | None = None) -> bytes:
        """What is left of the body; `UpstreamFailed` when the engine breaks off or never stops."""
        limit = MAX_ANSWER_BYTES if max_bytes is None else max_bytes
        parts: list[bytes] = []
        size = 0
        while part := await self._connection.read():
            parts.append(part)
            size += len(part)
            if size > limit:
                raise UpstreamFailed(f"the engine's answer is over {limit} bytes", code="bad_engine_answer")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def ended(self, timeout_s: float) -> None:
        """Give the last bytes of the framing their time to come, if they have not; nothing of a body is taken any more."""
        if not self._connection.is_answered:
            with suppress(TimeoutError, UpstreamFailed):
                await asyncio.wait_for(self._connection.ended(), timeout_s)

    def distrust(self) -> None:
        """The body held what it should not: nothing is to follow on its connection."""
        self._connection.abort()

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
            status = await connection.request(b"%s%d\r\n\r\n%s" % (self._heads[path], len(body), body))
        except BaseException:
            connection.abort()
            raise
        return EngineAnswer(self, connection, status)

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
            if connection.is_reusable and connection.is_silent:
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
