"""What a connection makes of an application's answers: their framing, their order, the end of the connection."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.handover import listening_socket
from gateway.metrics import Metrics
from gateway.proxy.app import Lifecycle
from gateway.proxy.asgi import App as Do
from gateway.proxy.asgi import Receive, Send
from gateway.server import GatewayServer
from gateway.settings import load_settings
from tests.fakes.stack import until
from tests.framing.wire import Wire

CRLF = b"\r\n"
GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


@asynccontextmanager
async def serving(do: Do) -> AsyncIterator[Wire]:
    """A connection to a server of one application."""
    settings = load_settings(port=0)
    server = GatewayServer(do, settings, Lifecycle(), Metrics(), cut_all=lambda: None)
    server.config.lifespan = "off"
    listening = listening_socket(settings)
    task = asyncio.create_task(server._serve(sockets=[listening]))
    await until(lambda: server.started or task.done())
    wire = await Wire.to(listening.getsockname()[1])
    try:
        yield wire
    finally:
        wire.close()
        server.should_exit = True
        await task


async def say(send: Send, body: bytes = b"", *, status: int = 200, headers: Any = (), more: bool = False) -> None:
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body, "more_body": more})


def said(body: bytes = b"", *, status: int = 200, length: int | None = None, headers: Any = ()) -> Do:
    async def do(scope: Any, receive: Receive, send: Send) -> None:
        own = [] if length is None else [(b"content-length", b"%d" % length)]
        await say(send, body, status=status, headers=[*own, *headers])

    return do


async def echo(scope: Any, receive: Receive, send: Send) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    await say(send, body, headers=[(b"content-length", b"%d" % len(body))])


async def raw(do: Do, sent: bytes) -> bytes:
    """Everything that comes back, up to the end of the connection."""
    async with serving(do) as wire:
        await wire.send(sent)
        return await wire.rest()


CLOSING = b" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"


# ---- How answers are framed


async def test_an_answer_of_unknown_length_comes_in_chunks() -> None:
    head, _, body = (await raw(said(b"hello"), b"GET /" + CLOSING)).partition(CRLF * 2)

    assert b"transfer-encoding: chunked" in head
    assert body == b"5\r\nhello\r\n0\r\n\r\n"


async def test_a_length_that_the_application_says_stands() -> None:
    head, _, body = (await raw(said(b"hello", length=5), b"GET /" + CLOSING)).partition(CRLF * 2)

    assert b"content-length: 5" in head
    assert b"transfer-encoding" not in head
    assert body == b"hello"


async def test_http_1_0_gets_no_chunks() -> None:
    head, _, body = (await raw(said(b"hello"), b"GET / HTTP/1.0\r\n\r\n")).partition(CRLF * 2)

    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    assert body == b"hello"


@pytest.mark.parametrize(
    ("method", "status", "length"), [(b"HEAD", 200, 5), (b"HEAD", 200, None), (b"GET", 204, None), (b"GET", 304, 5)]
)
async def test_answers_without_a_body_have_none(method: bytes, status: int, length: int | None) -> None:
    head, _, body = (await raw(said(b"hello", status=status, length=length), method + b" /" + CLOSING)).partition(
        CRLF * 2
    )

    assert body == b""
    assert (b"content-length: 5" in head) == (length == 5)
    assert b"transfer-encoding" not in head


async def test_204_says_no_length() -> None:
    assert b"content-length" not in await raw(said(status=204, length=0), b"GET /" + CLOSING)


@pytest.mark.parametrize("length", [4, 6])
async def test_an_answer_of_another_length_than_it_says_is_an_error_and_not_sent(length: int) -> None:
    answer = await raw(said(b"hello", length=length), GET)

    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"hello" not in answer


@pytest.mark.parametrize(
    "header", [(b"x", b"a\r\nset-cookie: b"), (b"x\r\ny", b"a"), (b"", b"a"), (b"transfer-encoding", b"chunked")]
)
async def test_a_header_that_is_none_is_an_error_and_not_sent(header: tuple[bytes, bytes]) -> None:
    answer = await raw(said(b"", length=0, headers=[header]), GET)

    assert answer.startswith(b"HTTP/1.1 500 ")
    assert b"cookie" not in answer


async def test_an_application_that_says_nothing_is_an_error() -> None:
    async def do(scope: Any, receive: Receive, send: Send) -> None:
        return

    assert (await raw(do, GET)).startswith(b"HTTP/1.1 500 ")


async def test_an_answer_that_breaks_off_ends_the_connection_without_its_last_chunk(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def do(scope: Any, receive: Receive, send: Send) -> None:
        await say(send, b"hello", more=True)
        raise RuntimeError("planned")

    with caplog.at_level(logging.CRITICAL):
        answer = await raw(do, GET)

    assert answer.endswith(b"5\r\nhello\r\n")


async def test_head_and_first_of_the_body_are_one_write() -> None:
    writes: list[bytes] = []

    async def do(scope: Any, receive: Receive, send: Any) -> None:
        connection = send.__self__._connection
        write = connection.write

        def noted(data: bytes) -> None:
            writes.append(data)
            write(data)

        connection.write = noted
        await say(send, b"hello", headers=[(b"content-length", b"5")])

    await raw(do, b"GET /" + CLOSING)

    assert len(writes) == 1


# ---- Expectations


def expecting(version: bytes = b"1.1", path: bytes = b"/") -> bytes:
    return b"POST " + path + b" HTTP/" + version + b"\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"


async def test_who_waits_to_send_is_told_to_go_on_when_the_body_is_wanted() -> None:
    async with serving(echo) as wire:
        await wire.send(expecting())
        interim = await asyncio.wait_for(wire._reader.readuntil(CRLF * 2), 5)
        await wire.send(b"hello")
        answer = await wire.answer()

    assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer is not None
    assert (answer.status, answer.body) == (200, b"hello")


async def test_who_waits_for_an_answer_that_needs_no_body_is_not_told_to_send_it() -> None:
    async with serving(said(b"no", status=401, length=2)) as wire:
        await wire.send(expecting())
        first = await asyncio.wait_for(wire._reader.readuntil(CRLF * 2), 5)

    assert first.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in first


async def test_http_1_0_is_told_nothing_before_its_answer() -> None:
    assert (await raw(echo, expecting(b"1.0") + b"hello")).startswith(b"HTTP/1.1 200 ")


async def test_who_has_sent_already_is_told_nothing() -> None:
    async with serving(echo) as wire:
        await wire.send(expecting() + b"hello")
        first = await asyncio.wait_for(wire._reader.readuntil(CRLF * 2), 5)

    assert first.startswith(b"HTTP/1.1 200 ")


# ---- Order, and ends


async def test_a_request_is_begun_when_the_one_before_it_is_answered() -> None:
    go_on = asyncio.Event()
    begun: list[str] = []

    async def do(scope: Any, receive: Receive, send: Send) -> None:
        begun.append(scope["path"])
        if scope["path"] == "/slow":
            await go_on.wait()
        await say(send, scope["path"].encode())

    async with serving(do) as wire:
        await wire.send(GET.replace(b"/ ", b"/slow ") + GET.replace(b"/ ", b"/quick ") + b"nonsense\r\n\r\n")
        await until(lambda: begun == ["/slow"])
        go_on.set()
        answers = [await wire.answer() for _ in range(3)]

    assert [answer and answer.status for answer in answers] == [200, 200, 400]
    assert [answer and answer.body for answer in answers[:2]] == [b"/slow", b"/quick"]
    assert begun == ["/slow", "/quick"]


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_body_that_breaks_is_refused_where_it_is_wanted_whenever_it_comes(pieces: int) -> None:
    sent = [b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"zz\r\n" + GET]
    async with serving(echo) as wire:
        for piece in sent if pieces == 2 else [b"".join(sent)]:
            await wire.send(piece)
        answer = await wire.answer()
        rest = await wire.rest()

    assert answer is not None
    assert (answer.status, answer.headers["connection"], rest) == (400, "close", b"")


@pytest.mark.parametrize("pieces", [1, 2])
async def test_a_body_that_breaks_spoils_no_answer_that_does_not_want_it(pieces: int) -> None:
    sent = [b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", b"zz\r\n" + GET]
    async with serving(said(b"no", status=401, length=2)) as wire:
        for piece in sent if pieces == 2 else [b"".join(sent)]:
            await wire.send(piece)
        answer = await wire.answer()
        rest = await wire.rest()

    assert answer is not None
    assert (answer.status, rest) == (401, b"")


@pytest.mark.parametrize("pieces", [1, 2])
async def test_chunks_that_nobody_reads_end_their_connection_and_the_answer_says_so(pieces: int) -> None:
    sent = [b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n" + GET]
    async with serving(said(b"no", status=401, length=2)) as wire:
        for piece in sent if pieces == 2 else [b"".join(sent)]:
            await wire.send(piece)
        answer = await wire.answer()
        rest = await wire.rest()

    assert answer is not None
    assert (answer.status, answer.headers["connection"], rest) == (401, "close", b"")


async def test_chunks_that_were_read_leave_the_connection_as_it_was() -> None:
    sent = (
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nConnection: close\r\n\r\n"
    )
    async with serving(echo) as wire:
        await wire.send(sent + sent)
        answers = [await wire.answer() for _ in range(2)]

    assert [answer and answer.body for answer in answers] == [b"hello", b"hello"]


async def test_an_application_that_closes_is_obeyed() -> None:
    answer = await raw(said(b"x", length=1, headers=[(b"connection", b"close")]), GET + GET)

    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.count(b"connection: close") == 1


async def test_who_leaves_is_told_to_the_application_that_waits() -> None:
    seen: list[str] = []

    async def do(scope: Any, receive: Receive, send: Send) -> None:
        seen.append((await receive())["type"])
        seen.append((await receive())["type"])

    async with serving(do) as wire:
        await wire.send(GET)
        await until(lambda: seen == ["http.request"])
        wire.close()
        await until(lambda: len(seen) == 2)

    assert seen == ["http.request", "http.disconnect"]


async def test_a_body_that_nobody_takes_is_not_read_on() -> None:
    held = asyncio.Event()
    connections: list[Any] = []

    async def do(scope: Any, receive: Receive, send: Send) -> None:
        connections.append(receive.__self__._connection)  # type: ignore[attr-defined]
        await held.wait()
        await echo(scope, receive, send)

    size = 32 * 2**20
    async with serving(do) as wire:
        sending = asyncio.create_task(
            wire.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size)
        )
        await until(lambda: bool(connections) and connections[0]._is_reading_paused)
        buffered = connections[0]._answer.buffered
        held.set()
        answer = await wire.answer()
        await sending

    assert buffered < 2**20
    assert answer is not None
    assert len(answer.body) == size
