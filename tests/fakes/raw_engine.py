"""An engine of raw bytes on a Unix socket: it plays a script for the next request, and answers all others as it should.

Nothing here knows HTTP beyond reading the gateway's requests, so that it can answer in any way there is.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOREIGN = "FOREIGN"
# What is long is cut more coarsely.
_MAX_PIECES = 2_000
_EVENT = {"object": "chat.completion.chunk", "created": 1}


@dataclass(frozen=True)
class Asked:
    """One request, and what a good answer to it is made of."""

    body: dict[str, Any]

    @property
    def text(self) -> str:
        """What a good answer says: the client's own words."""
        return str(self.body["messages"][-1]["content"])

    def whole(self, text: str | None = None, **fields: Any) -> bytes:
        """The answer in one piece."""
        message = {"role": "assistant", "content": self.text if text is None else text}
        choices = [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
        return _dumped({**self._head, "object": "chat.completion", "choices": choices, "usage": _USAGE, **fields})

    def chunk(self, text: str, *, finish: str | None = None, **fields: Any) -> bytes:
        """The JSON of one chunk."""
        choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": finish}
        return _dumped({**self._head, **_EVENT, "choices": [choice], **fields})

    @property
    def chunks(self) -> list[bytes]:
        """The JSON of every chunk of the answer: a letter or so each."""
        letters = [*self.text[:-1]]
        usage = _dumped({**self._head, **_EVENT, "choices": [], "usage": _USAGE})
        return [*(self.chunk(letter) for letter in letters), self.chunk(self.text[-1], finish="stop"), usage]

    @property
    def events(self) -> list[bytes]:
        """The answer as a stream."""
        return [b"data: %s\n\n" % chunk for chunk in [*self.chunks, b"[DONE]"]]

    @property
    def _head(self) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.body['request_id']}", "created": 1, "model": self.body["model"]}


_USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
Script = Callable[[Asked], bytes]


@dataclass(frozen=True)
class Play:
    """What to answer, whether to close after it, and how it is cut."""

    script: Script
    closes: bool = False
    piece_bytes: int | None = None


def _dumped(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def sized(body: bytes, *fields: str, status: str = "HTTP/1.1 200 OK") -> bytes:
    """An answer framed by its length."""
    return head(*fields, f"content-length: {len(body)}", status=status) + body


def head(*fields: str, status: str = "HTTP/1.1 200 OK") -> bytes:
    """A head with these fields and no others."""
    return "".join(f"{line}\r\n" for line in (status, *fields, "")).encode("latin-1")


def chunked(parts: Iterable[bytes], *fields: str, end: bytes = b"0\r\n\r\n", status: str = "HTTP/1.1 200 OK") -> bytes:
    """An answer in HTTP's chunks."""
    framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head(*fields, "transfer-encoding: chunked", status=status) + framed + end


def good(asked: Asked) -> bytes:
    """The answer as it should be."""
    return chunked(asked.events) if asked.body.get("stream") else sized(asked.whole())


def foreign(asked: Asked) -> bytes:
    """A good answer to nobody's request."""
    other = Asked({**asked.body, "messages": [{"content": FOREIGN}], "request_id": "req-" + "0" * 22})
    return good(other)


class RawEngine:
    """`async with RawEngine(socket) as engine`."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.asked: list[Asked] = []
        self.served_on: list[int] = []
        self._connections = 0
        self._scripts: deque[Play] = deque()
        self._open: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> RawEngine:
        self._server = await asyncio.start_unix_server(self._serve, str(self.socket))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._open:
            writer.transport.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def play(self, script: Script, *, closes: bool = False, piece_bytes: int | None = None) -> None:
        """Answer the next request like this, in pieces of so many bytes; then keep the connection or close it."""
        self._scripts.append(Play(script, closes, piece_bytes))

    def say(self, data: bytes) -> None:
        """Write on the newest connection at once, unasked."""
        self._open[-1].write(data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._connections += 1
        number = self._connections
        self._open.append(writer)
        try:
            while await self._answer(reader, writer, number):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        asked = Asked(json.loads(await _request(reader)))
        self.asked.append(asked)
        self.served_on.append(number)
        play = self._scripts.popleft() if self._scripts else Play(good)
        for piece in _pieces(play.script(asked), play.piece_bytes):
            writer.write(piece)
            await writer.drain()
            # Once round the loop for the gateway, which shares it, to read just this.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        return not play.closes


def _pieces(content: bytes, piece_bytes: int | None) -> list[bytes]:
    size = max(piece_bytes or len(content), len(content) // _MAX_PIECES, 1)
    return [content[start : start + size] for start in range(0, len(content), size)]


async def _request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return await reader.readexactly(length)
