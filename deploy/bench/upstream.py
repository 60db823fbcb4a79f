"""A stand-in for an engine that costs next to nothing: canned answers on a Unix socket, so that only the gateway is measured.

python -m deploy.bench.upstream SOCKET MODEL
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import cast

import uvloop

CHUNKS = 64


def whole_answer(model: str) -> bytes:
    """The answer to a request that does not stream."""
    answer = {
        "id": "chatcmpl-bench", "object": "chat.completion", "created": 1, "model": model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "word " * 64}, "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 64, "total_tokens": 84},
    }  # fmt: skip
    body = json.dumps(answer, separators=(",", ":")).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


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

    def __init__(self, whole: bytes, parts: list[bytes]) -> None:
        self._whole = whole
        self._parts = parts
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
            if b'"stream":true' in body:
                self._stream(0)
            else:
                self._write(self._whole)

    def _stream(self, place: int) -> None:
        # One event for each turn of the loop, as an engine's tokens come one by one.
        self._write(self._parts[place])
        if place + 1 < len(self._parts):
            asyncio.get_running_loop().call_soon(self._stream, place + 1)

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)


async def serve(socket: Path, model: str) -> None:
    """Serve until killed."""
    whole, parts = whole_answer(model), stream_parts(model)
    server = await asyncio.get_running_loop().create_unix_server(lambda: Upstream(whole, parts), str(socket))
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(Path(sys.argv[1]), sys.argv[2]))
