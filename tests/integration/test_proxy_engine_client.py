"""The client of engines against peers that behave, and peers that do not, on a real Unix socket."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from gateway.engine import client as module
from gateway.engine.client import EngineClient, EngineClients, EngineUnreachable
from gateway.errors import UpstreamFailed
from tests.fakes.stack import until

PATH = "/v1/completions"
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="turnout-test-") as folder:
        yield Path(folder) / "engine.sock"


@asynccontextmanager
async def serving(path: Path, peer: Peer) -> AsyncIterator[EngineClient]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await peer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(handle, str(path))
    client = EngineClient(str(path))
    try:
        yield client
    finally:
        client.close()
        server.close()


async def request_read(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return await reader.readexactly(length)


def answering(*answers: bytes, then_wait: bool = True) -> Peer:
    """A peer that gives these answers on each connection, one for each request."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await request_read(reader)
            writer.write(answer)
            await writer.drain()
        if then_wait:
            await reader.read()

    return peer


async def ask(client: EngineClient, body: bytes = b"{}") -> tuple[int, bytes]:
    answer = await client.post(PATH, body)
    try:
        return answer.status, await answer.read()
    finally:
        answer.release()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (OK, (200, b"ok")),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", (404, b"")),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", (200, b"abc")),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok", (200, b"ok")),
    ],
)
async def test_an_answer_is_read_whole(path: Path, answer: bytes, expected: tuple[int, bytes]) -> None:
    async with serving(path, answering(answer, answer)) as client:
        assert [await ask(client), await ask(client)] == [expected, expected]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_an_answer_that_breaks_off_is_an_error_and_not_an_answer(path: Path, answer: bytes) -> None:
    async with serving(path, answering(answer, then_wait=False)) as client:
        with pytest.raises(UpstreamFailed):
            await asyncio.wait_for(ask(client), 5)


async def test_without_a_peer_the_request_was_never_sent(path: Path) -> None:
    with pytest.raises(EngineUnreachable):
        await EngineClient(str(path)).post(PATH, b"{}")


async def test_data_that_nobody_asked_for_ends_the_connection(path: Path) -> None:
    connections = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await request_read(reader)
        writer.write(OK)
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        await reader.read()

    async with serving(path, peer) as client:
        first = await ask(client)
        await until(lambda: client._idle[0]._is_lost if client._idle else True)
        second = await ask(client)

    assert (first, second, connections) == ((200, b"ok"), (200, b"ok"), 2)


async def connections_for_two(path: Path, first: bytes, *, is_first_read: bool) -> int:
    """How many connections two requests take, of which the first is answered so."""
    connections = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await answering(first if connections == 1 else OK, OK)(reader, writer)

    async with serving(path, peer) as client:
        answer = await client.post(PATH, b"{}")
        if is_first_read:
            assert await answer.read() == b"ok"
        answer.release()
        assert await ask(client) == (200, b"ok")
    return connections


async def test_a_connection_is_used_again_only_after_an_answer_that_was_read_with_nothing_behind_it(path: Path) -> None:
    half = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nok"

    assert await connections_for_two(path, OK, is_first_read=True) == 1
    path.unlink()
    assert await connections_for_two(path, OK + b"x", is_first_read=True) == 2
    path.unlink()
    assert await connections_for_two(path, half, is_first_read=False) == 2


async def test_a_connection_that_was_idle_for_long_is_not_used_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KEEP_ALIVE_S", 0.0)
    connections = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await answering(OK, OK)(reader, writer)

    async with serving(path, peer) as client:
        await ask(client)
        await ask(client)

    assert connections == 2


async def test_a_reader_that_is_slow_holds_back_the_peer(path: Path) -> None:
    size = 16 * 2**20
    sent = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await request_read(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(b"x" * 2**16)
            await writer.drain()
            sent += 2**16
        await reader.read()

    async with serving(path, peer) as client:
        answer = await client.post(PATH, b"{}")
        await until(lambda: answer._connection._is_paused)
        stuck_at = sent
        await asyncio.sleep(0.05)

        assert sent <= stuck_at + 2**20 < size
        assert len(await answer.read()) == size
        answer.release()


async def test_an_answer_without_end_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ANSWER_BYTES", 10_000)
    async with serving(path, answering(b"HTTP/1.1 200 OK\r\ncontent-length: 20000\r\n\r\n" + b"x" * 20_000)) as client:
        with pytest.raises(UpstreamFailed, match="over 10000 bytes"):
            await ask(client)


async def test_giving_up_closes_the_connection_so_that_the_engine_stops(path: Path) -> None:
    gone = asyncio.Event()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_read(reader)
        await reader.read()
        gone.set()

    async with serving(path, peer) as client:
        asking = asyncio.create_task(client.post(PATH, b"{}"))
        await asyncio.sleep(0.05)
        asking.cancel()

        await asyncio.wait_for(gone.wait(), 5)


async def test_an_interim_answer_is_not_the_answer(path: Path) -> None:
    """Else the connection would be free before the answer has come, and the next client would get it."""
    may_finish = asyncio.Event()
    requests = 0

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        await request_read(reader)
        requests += 1
        if requests == 1:
            writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            await may_finish.wait()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfirst")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecond")
            may_finish.set()
        await reader.read()

    async with serving(path, peer) as client:
        first = asyncio.create_task(ask(client))
        await until(lambda: requests == 1)

        assert await ask(client) == (200, b"second")
        assert await first == (200, b"first")


@pytest.mark.parametrize("is_closing", [True, False])
async def test_what_came_unread_on_an_idle_connection_is_seen_before_it_is_used(
    path: Path, *, is_closing: bool
) -> None:
    writers: list[asyncio.StreamWriter] = []

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await answering(OK, OK)(reader, writer)

    async with serving(path, peer) as client:
        await ask(client)
        # Written and not yet read: between here and the next request the loop does not turn.
        if is_closing:
            writers[0].transport.get_extra_info("socket")._sock.shutdown(socket.SHUT_RDWR)
        else:
            writers[0].write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
        second = await ask(client)

    assert second == (200, b"ok")
    assert len(writers) == 2


async def early(path: Path) -> tuple[str | None, int]:
    """Ask with a body larger than any buffer, of a peer that answers before it has read it; the error, and what stays open."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await asyncio.sleep(0)
        await reader.read()

    async with serving(path, peer) as client:
        try:
            await asyncio.wait_for(ask(client, b"x" * 2**25), 5)
        except UpstreamFailed as error:
            return error.code, len(client._idle)
        return None, len(client._idle)


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_answer_that_begins_before_the_request_was_sent_is_a_failure(
    path: Path, loop_factory: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        assert runner.run(early(path)) == ("bad_engine_answer", 0)


async def test_answers_without_a_body_do_not_fill_the_buffer(path: Path) -> None:
    empty = b"HTTP/1.1 200 OK\r\nx: " + b"y" * 60_000 + b"\r\ncontent-length: 0\r\n\r\n"
    async with serving(path, answering(*[empty] * 10)) as client:
        for _ in range(10):
            assert await asyncio.wait_for(ask(client), 5) == (200, b"")


async def test_clients_of_replicas_that_are_gone_are_forgotten() -> None:
    clients = EngineClients()
    old = clients.client("r", "/s", "1")
    assert clients.client("r", "/s", "1") is old

    clients.keep_only([("r", "/s", "2")])

    assert clients.client("r", "/s", "1") is not old
