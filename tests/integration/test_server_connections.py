"""One connection to the gateway: what it may make the server remember, and what becomes of a body that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from gateway import tables
from gateway.connections import connection as connections
from tests.fakes.stack import Stack, chat_body, until

MIB = 2**20
UPLOAD = 30 * MIB
STRANGERS = MIB - 64 * 1024  # with everything around it less than what is read of a body without a known key


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        yield running


@pytest.fixture
async def wire(stack: Stack) -> AsyncIterator[Wire]:
    made = await Wire.to(stack)
    yield made
    made.writer.close()


class Wire:
    """A raw connection, and its answers one by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, stack: Stack) -> Wire:
        return cls(*await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2])))

    async def flood(self, pieces: Iterator[bytes]) -> int:
        """Send until all is sent, the server closes, or it takes no more; how many bytes it took."""
        sent = 0
        with contextlib.suppress(ConnectionError, TimeoutError):
            for piece in pieces:
                if self.reader.at_eof():
                    break
                self.writer.write(piece)
                await asyncio.wait_for(self.writer.drain(), 2)
                sent += len(piece)
        return sent

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers, body."""
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), 10)
        return int(first.split()[1]), headers, body

    async def closed(self, *, timeout_s: float = 10) -> bool:
        """Whether the server ends the connection; by a reset too."""
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(self.reader.read(), timeout_s)
        return True


def request(stack: Stack, method: str, path: str, *, key: str = "admin", body: bytes = b"", extra: str = "") -> bytes:
    raw = stack.keys.get(key, key)
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {raw}\r\n{extra}"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def chunked(stack: Stack) -> bytes:
    """The head of a request whose length nobody knows."""
    head = request(stack, "POST", "/api/keys", extra="content-type: application/json\r\n")
    return head.replace(b"content-length: 0", b"transfer-encoding: chunked")


def streaming(stack: Stack) -> bytes:
    body = json.dumps(chat_body("fake:chunks=2000 fake:delay_ms=20", stream=True)).encode()
    return request(stack, "POST", "/v1/chat/completions", key="inference", body=body)


# ---- What is remembered


def endless_headers() -> Iterator[bytes]:
    yield b"GET /v1/models HTTP/1.1\r\nhost: x\r\n"
    while True:
        yield (b"x-flood: " + b"y" * 8000 + b"\r\n") * 8


def endless_requests() -> Iterator[bytes]:
    while True:
        yield b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n" * 1000


def endless_trailers() -> Iterator[bytes]:
    yield b"POST /api/keys HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    while True:
        yield (b"x-flood: " + b"y" * 8000 + b"\r\n") * 8


def limited(pieces: Iterator[bytes], total: int = 64 * MIB) -> Iterator[bytes]:
    sent = 0
    for piece in pieces:
        yield piece
        sent += len(piece)
        if sent >= total:
            return


@pytest.mark.parametrize("flood", [endless_headers, endless_requests, endless_trailers])
async def test_behind_an_open_stream_a_connection_remembers_little_and_the_stream_ends_with_it(
    stack: Stack, wire: Wire, flood: Any
) -> None:
    wire.writer.write(streaming(stack))
    await until(lambda: stack.engine.running == 1)

    sent = await wire.flood(limited(flood()))

    assert sent < 16 * MIB
    wire.writer.transport.abort()  # where the server waits for its turn to read, the client gives up
    await until(lambda: stack.engine.running == 0, timeout_s=5)
    assert stack.engine.completed == 0


async def test_endless_trailers_are_cut_by_size(stack: Stack, wire: Wire) -> None:
    opening = chunked(stack)

    sent = await wire.flood(
        limited(iter([opening + b"2\r\n{}\r\n0\r\n", *[(b"x: " + b"y" * 8000 + b"\r\n") * 8] * 999]))
    )

    assert sent < 16 * MIB


async def test_requests_that_follow_one_another_unasked_are_answered_in_order(stack: Stack, wire: Wire) -> None:
    paths = ["/v1/models", "/v1/nothing", "/healthz", "/v1/models", "/api/keys"] * 4
    wire.writer.write(b"".join(request(stack, "GET", path) for path in paths))

    answers = [(await wire.answer())[0] for _ in paths]

    assert answers == [200, 404, 200, 200, 200] * 4


async def test_a_connection_that_always_sends_ahead_is_not_cut(
    stack: Stack, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HIGH_WATER_BYTES", 1024)
    one = request(stack, "GET", "/healthz", extra=f"x-fill: {'y' * 300}\r\n")
    wire.writer.write(one * 4)
    for _ in range(40):
        wire.writer.write(one)

        assert (await wire.answer())[0] == 200


async def test_a_large_body_in_small_chunks_is_not_taken_for_headers(stack: Stack, wire: Wire) -> None:
    opening = chunked(stack).replace(b"/api/keys", b"/v1/chat/completions")
    spaces = b"4\r\n    \r\n" * 10_000
    body = json.dumps(chat_body()).encode()

    await wire.flood(iter([opening, *[spaces] * 40, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)]))

    assert (await wire.answer())[0] == 200


# ---- Bodies that nobody reads


REFUSED = [
    ("a key without the scope", "/v1/files", "inference", 403, "insufficient_scope"),
    ("a completion over the cap", "/v1/chat/completions", "inference", 413, "body_too_large"),
    ("a request over the cap", "/api/keys", "admin", 413, "body_too_large"),
    ("an unknown path", "/v1/responses", "admin", 404, "unknown_url"),
]
CASES = pytest.mark.parametrize(
    ("path", "key", "status", "code"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)


@CASES
async def test_who_sends_a_large_body_in_vain_is_told_why(
    stack: Stack, path: str, key: str, status: int, code: str
) -> None:
    async with stack.client(key) as client:
        if path == "/v1/files":
            answer = await client.post(path, files={"file": ("a", b"x" * UPLOAD)}, data={"purpose": "fine-tune"})
        else:
            answer = await client.post(path, content=b"x" * UPLOAD)
        after = await client.get("/healthz")

    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert after.status_code == 200


@CASES
@pytest.mark.parametrize("closing", ["", "connection: close\r\n"])
async def test_the_answer_is_read_after_all_was_sent(
    stack: Stack, wire: Wire, path: str, key: str, status: int, code: str, closing: str
) -> None:
    extra = closing + "content-type: multipart/form-data; boundary=B\r\n"

    sent = await wire.flood(iter([request(stack, "POST", path, key=key, body=b"x" * UPLOAD, extra=extra)]))
    found, _, body = await wire.answer()

    assert sent > UPLOAD
    assert (found, json.loads(body)["error"]["code"]) == (status, code)
    if closing:
        assert await wire.closed()
    else:
        wire.writer.write(request(stack, "GET", "/v1/models"))
        assert (await wire.answer())[0] == 200


async def test_nothing_is_done_after_the_answer_that_closes_a_connection(stack: Stack, wire: Wire) -> None:
    stack.gateway.lifecycle.is_draining = True
    new_key = json.dumps({"name": "late", "scopes": ["admin"]}).encode()
    refused = request(stack, "POST", "/api/keys", body=b"x" * MIB, extra="connection: close\r\n")
    asked = request(stack, "POST", "/api/keys", body=new_key, extra="content-type: application/json\r\n")
    wire.writer.write(refused[:-1])
    status, headers, _ = await wire.answer()
    stack.gateway.lifecycle.is_draining = False

    wire.writer.write(refused[-1:] + asked)

    assert (status, headers["connection"]) == (503, "close")
    assert await wire.closed()
    assert "late" not in [row.name for row in await stack.rows(tables.api_keys)]


async def test_a_refused_body_that_is_malformed_gets_no_second_answer(stack: Stack, wire: Wire) -> None:
    wire.writer.write(chunked(stack).replace(stack.keys["admin"].encode(), b"tn-wrong"))
    assert (await wire.answer())[0] == 401

    wire.writer.write(b"no size\r\n")

    assert await asyncio.wait_for(wire.reader.read(), 5) == b""


@pytest.mark.parametrize(
    ("key", "size", "status"), [("tn-wrong", STRANGERS, 401), ("inference", UPLOAD, 403), ("train", UPLOAD, 400)]
)
async def test_a_blocking_client_that_closes_after_each_request_is_told_why(
    stack: Stack, key: str, size: int, status: int
) -> None:
    def post() -> int:
        connection = http.client.HTTPConnection("127.0.0.1", int(stack.url.rpartition(":")[2]), timeout=10)
        headers = {"Authorization": f"Bearer {stack.keys.get(key, key)}", "Connection": "close"}
        connection.request("POST", "/v1/files", body=b"x" * size, headers=headers)
        return connection.getresponse().status

    assert await asyncio.to_thread(post) == status


async def test_openais_client_is_told_that_its_key_is_wrong(stack: Stack) -> None:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="tn-wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.files.create(file=("train.jsonl", b"x" * STRANGERS), purpose="fine-tune")


async def test_openais_client_is_told_that_its_scope_is_too_small(stack: Stack) -> None:
    async with AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=stack.keys["inference"], max_retries=0) as client:
        with pytest.raises(openai.PermissionDeniedError):
            await client.files.create(file=("train.jsonl", b"x" * UPLOAD), purpose="fine-tune")


async def test_openais_client_is_told_that_a_file_is_too_large(tmp_path: Path) -> None:
    async with (
        Stack(tmp_path, limits={"file_bytes": MIB}) as stack,
        AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=stack.keys["train"], max_retries=0) as client,
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            await client.files.create(file=("train.jsonl", b"x" * UPLOAD), purpose="fine-tune")

        assert (refused.value.status_code, refused.value.code) == (413, "too_large")


@pytest.mark.parametrize("closing", ["", "connection: close\r\n"])
async def test_a_stranger_who_sends_a_mebibyte_in_vain_is_told_why(stack: Stack, wire: Wire, closing: str) -> None:
    sent = await wire.flood(
        iter([request(stack, "POST", "/v1/files", key="tn-wrong", body=b"x" * STRANGERS, extra=closing)])
    )
    found, _, body = await wire.answer()

    assert sent > STRANGERS
    assert (found, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    if closing:
        assert await wire.closed()
    else:
        wire.writer.write(request(stack, "GET", "/v1/models"))
        assert (await wire.answer())[0] == 200


@pytest.mark.parametrize("framing", [f"content-length: {2**40}", "transfer-encoding: chunked"])
@pytest.mark.parametrize("path", ["/v1/files", "/healthz", "/nothing"])
async def test_of_a_strangers_body_a_mebibyte_is_read(stack: Stack, wire: Wire, path: str, framing: str) -> None:
    head = request(stack, "POST", path, key="tn-wrong").replace(b"content-length: 0", framing.encode())

    sent = await wire.flood(limited(iter([head, *[b"100000\r\n" + b"x" * MIB + b"\r\n"] * 100])))

    assert sent < 16 * MIB  # what the sockets' buffers hold
    assert await wire.closed()


async def test_without_keys_everybody_is_known(tmp_path: Path) -> None:
    async with Stack(tmp_path, auth="none") as stack:
        wire = await Wire.to(stack)
        head = b"POST /v1/responses HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n" % UPLOAD

        sent = await wire.flood(limited(iter([head, *[b"x" * MIB] * 30])))

        assert sent > UPLOAD
        assert (await wire.answer())[0] == 404
        wire.writer.close()


async def test_a_refused_body_is_read_only_so_far(stack: Stack, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_REFUSED_BODY_BYTES", 4 * MIB)
    head = request(stack, "POST", "/v1/files", key="inference").replace(b"length: 0", b"length: %d" % 2**40)

    sent = await wire.flood(limited(iter([head, *[b"x" * MIB] * 100])))

    assert sent < 32 * MIB
    assert await wire.closed()


async def test_a_refused_body_that_drips_is_cut(stack: Stack, wire: Wire) -> None:
    stack.server._refused_body_timeout_s = 0.3
    wire.writer.write(request(stack, "POST", "/v1/files", key="tn-wrong").replace(b"length: 0", b"length: 99999"))
    assert (await wire.answer())[0] == 401

    async def drip() -> None:
        with contextlib.suppress(ConnectionError):
            while not wire.reader.at_eof():
                wire.writer.write(b"x")
                await wire.writer.drain()
                await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    assert await wire.closed(timeout_s=5)
    await dripping


async def test_after_a_refused_body_was_read_an_idle_connection_has_its_usual_time(stack: Stack, wire: Wire) -> None:
    stack.server._refused_body_timeout_s = stack.server._headers_timeout_s = 0.0
    wire.writer.write(request(stack, "POST", "/v1/files", key="inference", body=b"x" * MIB))
    assert (await wire.answer())[0] == 403

    connection: Any = next(iter(stack.server.server_state.connections))
    await until(lambda: connection.is_idle)
    stack.server._close_stragglers()
    wire.writer.write(request(stack, "GET", "/v1/models"))

    assert (await wire.answer())[0] == 200
    assert connection.is_idle


async def test_a_connection_that_says_nothing_more_is_closed_after_its_time(stack: Stack, wire: Wire) -> None:
    wire.writer.write(request(stack, "GET", "/healthz"))
    assert (await wire.answer())[0] == 200
    connection: Any = next(iter(stack.server.server_state.connections))
    assert connection.is_idle

    connection._keep_alive_s = 0.0
    stack.server._close_stragglers()

    assert await asyncio.wait_for(wire.reader.read(), 5) == b""


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nhost: x\r\n"])
async def test_a_head_that_does_not_come_is_waited_for_only_so_long(stack: Stack, wire: Wire, sent: bytes) -> None:
    stack.server._headers_timeout_s = 0.0
    wire.writer.write(sent)
    await until(lambda: len(stack.server.server_state.connections) == 1)

    stack.server._close_stragglers()

    assert await wire.closed(timeout_s=5)


async def test_a_connection_tells_who_it_is_and_whether_it_showed_a_key(stack: Stack, wire: Wire) -> None:
    wire.writer.write(request(stack, "GET", "/v1/models", key="tn-wrong"))
    assert (await wire.answer())[0] == 401
    connection: Any = next(iter(stack.server.server_state.connections))
    before = connection.has_shown_key

    wire.writer.write(request(stack, "GET", "/v1/models"))
    assert (await wire.answer())[0] == 200

    assert (before, connection.has_shown_key, connection.client[0]) == (False, True, "127.0.0.1")
