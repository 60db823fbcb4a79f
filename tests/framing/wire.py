"""A raw connection that sends what it is told, and reads the answers as a strict client would."""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass
from typing import Literal

from .rows import CRLF, Row

Split = Literal["whole", "lines", "bytes"]
ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def to(cls, port: int) -> Wire:
        """Connect."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def send(self, data: bytes, split: Split = "whole") -> None:
        """Send, in pieces that the other side reads one by one. A server that has closed takes no more."""
        with contextlib.suppress(ConnectionError):
            for piece in pieces(data, split):
                self._writer.write(piece)
                await self._writer.drain()
                if split != "whole":
                    await asyncio.sleep(0)

    def end(self) -> None:
        """Say that nothing follows."""
        with contextlib.suppress(OSError):
            self._writer.write_eof()

    async def answer(self, *, is_head: bool = False, timeout_s: float = ANSWER_TIMEOUT_S) -> Answer | None:
        """The next answer that is one; None when the connection ends first. Interim ones are passed over."""
        async with asyncio.timeout(timeout_s):
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    found = await self._answer(is_head=is_head)
                    if found.status >= 200:
                        return found
        return None

    async def _answer(self, *, is_head: bool) -> Answer:
        head = (await self._reader.readuntil(CRLF * 2)).decode("latin-1")
        first, *lines = head[:-4].split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        status = int(first.split()[1])
        if is_head or status < 200 or status in (204, 304):
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            return Answer(status, headers, await self._chunks())
        if "content-length" in headers:
            return Answer(status, headers, await self._reader.readexactly(int(headers["content-length"])))
        return Answer(status, headers, await self._reader.read())

    async def _chunks(self) -> bytes:
        parts = []
        while size := int(await self._reader.readuntil(CRLF), 16):
            parts.append((await self._reader.readexactly(size + 2))[:-2])
        await self._reader.readexactly(2)
        return b"".join(parts)

    async def rest(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> bytes:
        """Everything up to the end of the connection."""
        async with asyncio.timeout(timeout_s):
            with contextlib.suppress(ConnectionError):
                return await self._reader.read()
        return b""

    @property
    def has_ended(self) -> bool:
        """Whether the server has ended the connection, as far as is known."""
        return self._reader.at_eof()

    def close(self) -> None:
        """Be gone."""
        self._writer.transport.abort()


def pieces(data: bytes, split: Split) -> list[bytes]:
    """The same bytes in several pieces."""
    if split == "whole":
        return [data]
    if split == "bytes":
        return [data[at : at + 1] for at in range(len(data))]
    return [line for line in re.split(rb"(?<=\n)", data) if line]


async def wrong_with(row: Row, port: int, key: str, split: Split = "whole") -> str | None:
    """Send a row straight to the gateway; what was not as it must be."""
    wire = await Wire.to(port)
    try:
        return await _wrong(row, wire, key, split)
    except TimeoutError:
        return "no answer, and no end, in time"
    finally:
        wire.close()


async def _wrong(row: Row, wire: Wire, key: str, split: Split) -> str | None:
    sending = asyncio.create_task(wire.send(row.sent, split))
    found: list[int] = []
    for _ in row.statuses:
        answer = await wire.answer(is_head=row.is_head)
        if answer is None:
            return f"answered {found}, then ended; expected {row.statuses}"
        found.append(answer.status)
    if tuple(found) != row.statuses:
        return f"answered {found}; expected {row.statuses}"
    await sending
    if row.stays:
        return await _wrong_after(wire, key)
    if not row.statuses:
        wire.end()
    rest = await wire.rest()
    return f"after {found} came {rest[:60]!r}" if rest else None


async def _wrong_after(wire: Wire, key: str) -> str | None:
    """The connection's next request is its own."""
    name = "the-next-request"
    await wire.send(
        f"GET /v1/models/{name} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
    )
    answer = await wire.answer()
    if answer is None:
        return "the connection was closed"
    return None if answer.status == 404 and name.encode() in answer.body else f"the next request got {answer}"
