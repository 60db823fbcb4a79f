"""A load generator that is much cheaper than what it measures: one canned request, sent again when its answer is complete."""

from __future__ import annotations

import asyncio
import json
from typing import Any


def request_bytes(path: str, body: dict[str, Any], key: str) -> bytes:
    """One HTTP request, ready to send."""
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class Client(asyncio.Protocol):
    """One connection that keeps one request in flight."""

    def __init__(self, request: bytes, ending: bytes, load: Load) -> None:
        self._request = request
        self._ending = ending
        self._load = load
        self._answer = bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        if not isinstance(transport, asyncio.Transport):
            raise TypeError(f"{transport!r} is not a connection")
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count a complete answer; send the next request."""
        self._answer += data
        if not self._answer.endswith(self._ending):
            return
        if not self._answer.startswith(b"HTTP/1.1 200 "):
            self._load.fail(f"the gateway answered {bytes(self._answer[:300])!r}")
            return
        self._answer.clear()
        if self._load.finished_one() and self.transport is not None:
            self.transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        """No connection may break while load runs."""
        self._load.fail(f"a connection broke: {error}")


class Load:
    """A number of requests, over a number of connections."""

    def __init__(self, total: int) -> None:
        self._left = total
        self._to_send = total
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def finished_one(self) -> bool:
        """Note an answer; whether another request is to be sent."""
        self._left -= 1
        if self._left <= 0 and not self._done.done():
            self._done.set_result(None)
        return not self._done.done()

    def fail(self, reason: str) -> None:
        """End with an error, unless all is done."""
        if not self._done.done():
            self._done.set_exception(RuntimeError(reason))

    async def run(self, host: str, port: int, request: bytes, ending: bytes, *, connections: int) -> None:
        """Send them all; raise when one fails."""
        loop = asyncio.get_running_loop()
        clients = [
            (await loop.create_connection(lambda: Client(request, ending, self), host, port))[1]
            for _ in range(connections)
        ]
        try:
            await self._done
        finally:
            for client in clients:
                if client.transport is not None:
                    client.transport.abort()
