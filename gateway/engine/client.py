"""Connections from the data plane to engine replicas: HTTP over Unix sockets, kept alive, pooled per replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import aiohttp
from yarl import URL

from ..errors import UpstreamFailed

# Shorter than the engine's own (5 s), so that a connection is never used in the moment the engine closes it.
_KEEP_ALIVE_S = 4.0
_CONNECT_TIMEOUT_S = 5.0
_READ_BUFFER_BYTES = 2**16
_HEADERS = {"content-type": "application/json", "accept": "*/*"}
MAX_ANSWER_BYTES = 64 * 2**20


class EngineUnreachable(UpstreamFailed):
    """No connection to the engine: it has seen nothing of the request."""


class EngineAnswer:
    """An answer whose status is known and whose body is still to be read."""

    __slots__ = ("_response", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self._response = response

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes; `UpstreamFailed` when the engine breaks off."""
        content = self._response.content
        try:
            while part := await content.readany():
                yield part
        except (aiohttp.ClientError, OSError) as error:
            raise _broken() from error

    async def read(self) -> bytes:
        """What is left of the body; `UpstreamFailed` when the engine breaks off or never stops."""
        parts: list[bytes] = []
        size = 0
        async for part in self.parts():
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise UpstreamFailed(f"the engine's answer is over {MAX_ANSWER_BYTES} bytes", code="bad_engine_answer")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> None:
        """Give the connection back if the answer was read to its end; close it otherwise, which cancels the request."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


def _broken() -> UpstreamFailed:
    return UpstreamFailed("the engine broke off its answer; try again", code="engine_error")


class EngineClient:
    """One replica's completion routes. Nothing else of the engine is reachable through it."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.in_flight = 0
        self._session: aiohttp.ClientSession | None = None
        self._urls = {
            path: URL(f"http://engine{path}", encoded=True) for path in ("/v1/chat/completions", "/v1/completions")
        }

    async def post(self, path: str, body: bytes) -> EngineAnswer:
        """Send a completion request; return when the engine has said its status. `UpstreamFailed` when it cannot be reached."""
        if self._session is None:
            self._session = _new_session(self.socket)
        try:
            response = await self._session.post(self._urls[path], data=body)
        except aiohttp.ClientConnectorError as error:
            raise EngineUnreachable("the engine cannot be reached; try again", code="engine_unreachable") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _broken() from error
        return EngineAnswer(response)

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()


def _new_session(socket: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(socket, limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        headers=_HEADERS,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("user-agent", "accept-encoding"),
        auto_decompress=False,
        read_bufsize=_READ_BUFFER_BYTES,
    )


class EngineClients:
    """A client for each (replica, epoch): an engine that was started anew never gets an old one's connections."""

    def __init__(self) -> None:
        self._clients: dict[tuple[str, str, str], EngineClient] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def client(self, replica_id: str, socket: str, epoch: str) -> EngineClient:
        """The replica's client."""
        key = (replica_id, socket, epoch)
        found = self._clients.get(key)
        if found is None:
            found = self._clients[key] = EngineClient(socket)
        return found

    def keep_only(self, replicas: Iterable[tuple[str, str, str]]) -> None:
        """Drop clients of replicas that are gone, once they answer nothing any more."""
        wanted = set(replicas)
        for key in [key for key, client in self._clients.items() if key not in wanted and client.in_flight == 0]:
            task = asyncio.ensure_future(self._clients.pop(key).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close every client."""
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.close()
        await asyncio.gather(*self._closing)
