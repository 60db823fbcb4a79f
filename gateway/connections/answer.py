"""One request as the application sees it, and its answer on the way to the client."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from typing import TYPE_CHECKING

import structlog

from ..errors import Unavailable
from ..proxy.asgi import SHOWED_KEY, App, Headers, Message, Scope
from .heads import Head, Refusal

if TYPE_CHECKING:
    from .connection import Connection

log = structlog.get_logger(__name__)

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_BODILESS = frozenset({204, 304})
_HEADERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9a-z-]++: [\t -~\x80-\xff]*+\r\n)*+")
_ABOUT_FRAMING = frozenset({b"connection", b"content-length", b"transfer-encoding"})
_FAILED: Headers = [
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"content-length", b"21"),
    (b"connection", b"close"),
]


def _status_lines() -> dict[int, bytes]:
    phrases = {status.value: status.phrase for status in HTTPStatus}
    return {status: f"HTTP/1.1 {status} {phrases.get(status, '')}\r\n".encode() for status in range(200, 600)}


STATUS_LINES = _status_lines()


class Answer:
    """ASGI's `receive` and `send` of one request. It only writes; whether the connection lives is the connection's choice."""

    __slots__ = (
        "_changed",
        "_connection",
        "_end_told",
        "_expects_continue",
        "_has_chunks",
        "_head",
        "_is_chunked",
        "_is_gone",
        "_is_head_request",
        "_is_written",
        "_left",
        "_parts",
        "_version",
        "buffered",
        "has_known_key",
        "is_complete",
        "is_whole",
        "keeps_alive",
        "refusal",
    )

    def __init__(self, head: Head, connection: Connection) -> None:
        self._connection = connection
        self._changed = asyncio.Event()
        self._parts: list[bytes] = []
        self._end_told = False
        self._expects_continue = head.expects_continue
        self._has_chunks = head.body_bytes is None
        self._is_head_request = head.method == "HEAD"
        self._version = head.version
        # What is said first is kept until the first of the body: one write, and an error until then can still be told.
        self._head: bytes | None = None
        self._is_written = False
        self._is_chunked = False
        self._left: int | None = 0
        self._is_gone = False
        self.buffered = 0
        self.has_known_key = False
        self.is_complete = False
        self.is_whole = False
        self.keeps_alive = head.keeps_alive
        self.refusal: Refusal | None = None

    # ---- The connection's side

    def add(self, part: bytes) -> None:
        """More of the request's body."""
        self._parts.append(part)
        self.buffered += len(part)
        self._changed.set()

    def end_body(self) -> None:
        """The request is whole."""
        self.is_whole = True
        self._changed.set()

    def break_body(self, refusal: Refusal) -> None:
        """The request will never be whole. Who asks for its body is told; an answer that needs none stands."""
        self.refusal = refusal
        self.keeps_alive = False
        self._changed.set()

    def lose(self) -> None:
        """Nobody hears this answer any more."""
        self._is_gone = True
        self._changed.set()

    @property
    def is_written(self) -> bool:
        """Whether the client may have read some of it."""
        return self._is_written

    def showed_key(self) -> None:
        """The application knows who asks. Raises `Unavailable` when there is no room for one more."""
        self.has_known_key = True
        if not self._connection.show_key():
            self.keeps_alive = False
            text = (
                "all connections that this server can keep are being answered (setting limits.connections); try again"
            )
            raise Unavailable(text, code="too_many_connections")

    async def run(self, app: App, scope: Scope) -> None:
        """The application, and what must be said if it says nothing."""
        scope[SHOWED_KEY] = self.showed_key
        try:
            await app(scope, self.receive, self.send)
        except Exception:
            log.exception("the application failed", path=scope["path"])
        finally:
            if not self.is_complete and not self._is_gone:
                self._fail()

    def _fail(self) -> None:
        if self._is_written:
            self._connection.cut()
            return
        self.is_complete = True
        self.keeps_alive = False
        self._connection.write(
            self._render(500, _FAILED) + (b"" if self._is_head_request else b"Internal Server Error")
        )
        self._connection.answered()

    # ---- The application's side

    async def receive(self) -> Message:
        """The next of the body, in order; then, when there is nobody left to answer, that."""
        while not (self._is_gone or self.is_complete):
            if self._parts or (self.is_whole and not self._end_told):
                return self._next_part()
            if self.refusal is not None:
                self._connection.refuse_body(self.refusal)
            else:
                self._ask_for_body()
                await self._changed.wait()
                self._changed.clear()
        return {"type": "http.disconnect"}

    def _next_part(self) -> Message:
        body = b"".join(self._parts) if len(self._parts) != 1 else self._parts[0]
        self._parts.clear()
        self.buffered = 0
        self._end_told = self.is_whole
        self._connection.update_reading()
        return {"type": "http.request", "body": body, "more_body": not self.is_whole}

    def _ask_for_body(self) -> None:
        if self._expects_continue and not self._is_written:
            self._connection.write(CONTINUE)
        self._expects_continue = False

    async def send(self, message: Message) -> None:
        """The next of the answer."""
        if self._connection.is_write_paused and not self._is_gone:
            await self._connection.writable()
        if self._is_gone:
            return
        kind = message["type"]
        if self.is_complete:
            raise RuntimeError(f"{kind} after the end of the answer")
        if self._head is None:
            if kind != "http.response.start":
                raise RuntimeError(f"{kind} before the beginning of the answer")
            self._head = self._render(message["status"], message.get("headers", []))
            return
        if kind != "http.response.body":
            raise RuntimeError(f"{kind} in an answer that has begun")
        self._send_body(message.get("body", b""), is_last=not message.get("more_body", False))

    def _send_body(self, body: bytes, *, is_last: bool) -> None:
        data = self._framed(body, is_last=is_last)
        if not self._is_written:
            data = (self._head or b"") + data
            self._is_written = True
        if data:
            self._connection.write(data)
        if is_last:
            self.is_complete = True
            self._changed.set()
            self._connection.answered()

    def _framed(self, body: bytes, *, is_last: bool) -> bytes:
        if self._is_chunked:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            return chunk + b"0\r\n\r\n" if is_last else chunk
        if self._left is None:
            return body
        if self._left < 0:
            return b""
        self._left -= len(body)
        if self._left < 0 or (is_last and self._left > 0):
            raise RuntimeError("the answer is not as long as its content-length says")
        return body

    def _render(self, status: int, headers: Headers) -> bytes:
        """The head of the answer; decides how its body is framed."""
        lines: list[bytes] = []
        length: int | None = None
        for name, value in (*self._connection.default_headers, *headers):
            lowered = name.lower()
            if lowered in _ABOUT_FRAMING:
                if lowered == b"transfer-encoding":
                    raise RuntimeError("how an answer is framed is not the application's to say")
                if lowered == b"connection":
                    self.keeps_alive = self.keeps_alive and b"close" not in value.lower()
                    continue
                length = int(value)
                if status == 204:
                    continue
            lines += (lowered, b": ", value, b"\r\n")
        block = b"".join(lines)
        # One look at all of them. A value with a line's end in it would look like two headers.
        if _HEADERS.fullmatch(block) is None or block.count(b"\n") * 4 != len(lines):
            raise RuntimeError(f"the answer has a header that is none, among {[name for name, _ in headers]!r:.200}")
        own = self._choose_framing(status, length)
        if not self.keeps_alive:
            own += b"connection: close\r\n"
        return b"%b%b%b\r\n" % (STATUS_LINES[status], block, own)

    def _choose_framing(self, status: int, length: int | None) -> bytes:
        # A body that is waited for, and was not asked for, may come or not: the next request could be either.
        is_awaited = self._expects_continue and not self.is_whole and self.buffered == 0
        # Chunks that nobody has read may yet turn out to be none. A front that took them for whole would have sent the
        # next client's request already when the connection ends, so it is told now, whether they have come or not.
        is_unsure = self._has_chunks and not self._end_told
        if is_awaited or is_unsure:
            self.keeps_alive = False
        self._is_chunked, self._left = False, length
        if self._is_head_request or status in _BODILESS:
            self._left = -1
        elif length is None and self._version == "1.1":
            self._is_chunked = True
            return b"transfer-encoding: chunked\r\n"
        return b""
