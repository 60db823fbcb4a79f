"""A stand-in for an engine that costs next to nothing: canned answers on a Unix socket, so that only the gateway is measured.

python -m deploy.bench.upstream SOCKET
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import cache
from pathlib import Path
from typing import cast

import uvloop

CHUNKS = 64


def asked_model(body: bytes) -> str:
    """The name that a request's body asks for, and that its answer names."""
    start = body.index(b'"model":"') + len(b'"model":"')
    return body[start : body.index(b'"', start)].decode()


@cache
def whole_answer(model: str) -> bytes:
    """The answer to a request that does not stream."""
    answer = {
        "id": "chatcmpl-bench", "object": "chat.completion", "created": 1, "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 64}, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 64, "total_tokens": 84},
    }  # fmt: skip
    body = json.dumps(answer, separators=(",", ":")).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


@cache
def stream_parts(model: str) -> list[bytes]:
    """Headers, then one part for each event, framed as HTTP chunks."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    events = [_event(model, number) for number in range(CHUNKS)]
    usage = {"prompt_tokens": 20, "completion_tokens": CHUNKS, "total_tokens": 20 + CHUNKS}
    events.append(_data({**_head(model), "choices": [], "usage": usage}))
    events.append(b"data: [DONE]\n\n")
    framed = [b"%x\r\n%s\r\n" % (len(event), event) for event in events]
    return [head + framed[0], *framed[1:-1], framed[-1] + b"0\r\n\r\n"]


def _head(model: str) -> dict[str, object]:
    return {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1, "model": model}


def _event(model: str, number: int) -> bytes:
    finish = "stop" if number == CHUNKS - 1 else None
    choice = {"index": 0, "delta": {"content": "word "}, "logprobs": None, "finish_reason": finish}
    return _data({**_head(model), "choices": [choice]})


def _data(value: dict[str, object]) -> bytes:
    return b"data: %s\n\n" % json.dumps(value, separators=(",", ":")).encode()


class Upstream(asyncio.Protocol):
    """One connection. Reads as little of HTTP as the gateway's requests need."""

    def __init__(self) -> None:
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are no subclasses of asyncio's

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            start = head.index(b"content-length:") + 15
            length = int(head[start:].split(b"\r\n", 1)[0])
            if len(self._data) < end + 4 + length:
                return
            body = self._data[end + 4 : end + 4 + length]
            self._data = self._data[end + 4 + length :]
            model = asked_model(body)
            if b'"stream":true' in body:
                self._stream(stream_parts(model), 0)
            else:
                self._write(whole_answer(model))

    def _stream(self, parts: list[bytes], place: int) -> None:
        # One event for each turn of the loop, as an engine's tokens come one by one.
        self._write(parts[place])
        if place + 1 < len(parts):
            asyncio.get_running_loop().call_soon(self._stream, parts, place + 1)

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


async def serve(socket: Path) -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_unix_server(Upstream, str(socket))
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1])))
