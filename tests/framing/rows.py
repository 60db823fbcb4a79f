"""One odd request of the corpus: what is sent, and what a server that frames strictly makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

CRLF = b"\r\n"
# Stands where a row's number comes; of the number's length, because lengths are counted before.
NUMBER = b"####"
CHAT = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}).encode()


@dataclass(frozen=True)
class Row:
    """What goes over one connection, the answers in their order, and what becomes of the connection.

    Inside of what is sent, or behind it, stands a request that must never be run.
    """

    family: str
    name: str
    sent: bytes
    statuses: tuple[int, ...]
    stays: bool = False
    is_head: bool = False
    made: int = 0
    """How many keys it makes by right."""

    @property
    def label(self) -> str:
        """How a report names it."""
        return f"{self.family}: {self.name}"

    def numbered(self, number: int) -> Row:
        """The same with names of its own."""
        return replace(self, sent=self.sent.replace(NUMBER, b"%04d" % number))


@dataclass(frozen=True)
class Words:
    """The pieces that rows are made of."""

    key: str
    plant: bytes
    """What an attacker would have run in somebody's name."""
    host: bytes = b"Host: 127.0.0.1"

    @property
    def auth(self) -> bytes:
        """The header that lets an admin in."""
        return b"Authorization: Bearer " + self.key.encode()

    def head(self, line: bytes, *lines: bytes, host: bytes | None = None, auth: bytes | None = None) -> bytes:
        """A head with host and key; the lines as they are."""
        own = [line, self.host if host is None else host, self.auth if auth is None else auth, *lines]
        return CRLF.join(one for one in own if one) + CRLF + CRLF

    def get(self, *lines: bytes, path: bytes = b"/v1/models", version: bytes = b"HTTP/1.1", **kind: bytes) -> bytes:
        """A good GET but for what is added."""
        return self.head(b"GET " + path + b" " + version, *lines, **kind)

    def post(
        self, *lines: bytes, version: bytes = b"HTTP/1.1", path: bytes = b"/v1/chat/completions", **kind: bytes
    ) -> bytes:
        """The head of a completion that says nothing of its body."""
        return self.head(b"POST " + path + b" " + version, b"Content-Type: application/json", *lines, **kind)

    def sized(self, body: bytes = CHAT, *lines: bytes, **kind: bytes) -> bytes:
        """A good POST with a length."""
        return self.post(b"Content-Length: %d" % len(body), *lines, **kind) + body

    def chunked(self, *lines: bytes, **kind: bytes) -> bytes:
        """The head of a good chunked POST."""
        return self.post(b"Transfer-Encoding: chunked", *lines, **kind)


Family = Callable[[Words], list[Row]]


def new_key(name: bytes, words: Words) -> bytes:
    """A request that makes a key."""
    body = b'{"name":"%s-%s","scopes":["inference"]}' % (name, NUMBER)
    return words.sized(body, path=b"/api/keys")


def planted(key: str) -> bytes:
    """A whole request that makes an admin's key; wherever it stands it is a body, or behind a refusal."""
    body = b'{"name":"planted-%s","scopes":["admin"]}' % NUMBER
    return Words(key, b"").sized(body, path=b"/api/keys")


def open_ended() -> bytes:
    """What takes in the next client's request, were it ever read as the beginning of one. It needs no key."""
    return b"GET /v1/models/stolen-%s HTTP/1.1\r\nX-Open: " % NUMBER


def chunk(data: bytes, *, size: bytes | None = None, end: bytes = CRLF) -> bytes:
    """One chunk."""
    return (b"%x" % len(data) if size is None else size) + CRLF + data + end


def kept(status: int = 200) -> tuple[tuple[int, ...], bool]:
    """One answer, and the connection goes on."""
    return (status,), True


def cut(status: int = 400) -> tuple[tuple[int, ...], bool]:
    """One answer, and the connection is closed."""
    return (status,), False
