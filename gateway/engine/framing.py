"""Where an engine's answer begins and ends: HTTP/1.1 from the side that asked. Pure: bytes in, bytes out, no socket.

Strict, because what is read wrongly here is handed to the next client on the connection: whatever could be understood
in two ways is a failure, and nothing behind the end of an answer is looked at. The result depends on the bytes alone,
never on how they were cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Of one answer: its head and those of all interim answers before it.
MAX_HEAD_BYTES = 64 * 2**10
MAX_TRAILER_BYTES = 16 * 2**10
_SWITCHING_PROTOCOLS = 101
_OK = 200
_BODILESS = (204, 304)

_FIELD = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[\t\x20-\x7e\x80-\xff]*+"
_HEAD = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2}) [\t\x20-\x7e\x80-\xff]*+\r\n((?:" + _FIELD + rb"\r\n)*+)\r\n")
_HEAD_END = b"\r\n\r\n"
_HEAD_START = b"HTTP/1."
_TRAILER = re.compile(rb"(?:" + _FIELD + rb")?\r\n")
_KEEP_ALIVE = b"keep-alive"
_STEERING = (b"content-length", b"transfer-encoding", b"connection")
_LENGTH = re.compile(rb"[0-9]{1,15}")
# An extension is allowed and means nothing. The line may be cut anywhere.
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8}+)(?:;[\t\x20-\x7e\x80-\xff]{0,255}+)?(\r\n|\r?\Z)")
_CRLF = b"\r\n"
_BAD_LINE_END = re.compile(rb"[^\r]\n|\r[^\n]")


class BadFraming(Exception):
    """These bytes are no answer, or could be read as more than one."""


class AnswerFraming:
    """One answer, fed as it comes; its body gathers in `parts`, for the reader to take away.

    `status` is 0 until the answer's own head is whole. After `BadFraming` it must not be fed again.
    """

    __slots__ = (
        "_checked",
        "_head_bytes",
        "_left",
        "_rest",
        "_step",
        "has_surplus",
        "is_complete",
        "keeps_open",
        "parts",
        "status",
    )

    def __init__(self) -> None:
        self.status = 0
        self.parts: list[bytes] = []
        self.is_complete = False
        # Whether the engine takes another request on the connection after this answer.
        self.keeps_open = True
        # Whether anything came behind the end.
        self.has_surplus = False
        self._step: _Step = AnswerFraming._head
        self._rest = b""
        self._left = 0
        self._head_bytes = 0
        self._checked = 0

    def feed(self, data: bytes) -> None:
        """Take what came. `BadFraming` when it cannot be, or may not be, an answer."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        at, size = 0, len(data)
        while at < size:
            if self.is_complete:
                self.has_surplus = True
                return
            at = self._step(self, data, at)

    def end(self) -> None:
        """The engine closed the connection in good order, which completes an answer that has no other end."""
        if self._step is AnswerFraming._open_body:
            self.is_complete = True

    # ---- Steps: each takes what it can from `data` at a place, and says where the next begins

    def _head(self, data: bytes, at: int) -> int:
        end = data.find(_HEAD_END, at)
        stop = end + len(_HEAD_END) if end >= 0 else len(data)
        if self._head_bytes + stop - at > MAX_HEAD_BYTES:
            raise BadFraming(f"a head over {MAX_HEAD_BYTES} bytes")
        if end < 0:
            return self._await_head(data, at)
        match = _HEAD.fullmatch(data, at, stop)
        if match is None:
            raise BadFraming("a malformed head")
        self._checked = 0
        self._head_bytes += stop - at
        status, steering = int(match[2]), _steering(match[3])
        if steering.get(b"connection", _KEEP_ALIVE) != _KEEP_ALIVE:
            self.keeps_open = False
        if status < _OK:
            _check_interim(status, steering)
        else:
            self._begin(status, steering, is_old=match[1] == b"0")
        return stop

    def _await_head(self, data: bytes, at: int) -> int:
        """Keep the beginning of a head, unless it is none already: an engine that waits would be waited for."""
        self._rest = data[at:]
        if not self._rest.startswith(_HEAD_START[: len(self._rest)]):
            raise BadFraming("a malformed status line")
        if _BAD_LINE_END.search(self._rest, max(0, self._checked - 1)):
            raise BadFraming("a line of the head that does not end in CRLF")
        self._checked = len(self._rest)
        return len(data)

    def _begin(self, status: int, steering: dict[bytes, bytes], *, is_old: bool) -> None:
        self.status = status
        length, coding = steering.get(b"content-length"), steering.get(b"transfer-encoding")
        if is_old:
            self.keeps_open = False
        if status in _BODILESS:
            self.keeps_open = False
            self.is_complete = True
        elif coding is not None:
            if length is not None or is_old or coding != b"chunked":
                raise BadFraming("a transfer-encoding that is not `chunked` alone")
            self._step = AnswerFraming._chunk
        elif length is not None:
            if _LENGTH.fullmatch(length) is None:
                raise BadFraming("a malformed content-length")
            self._left = int(length)
            self._step = AnswerFraming._sized_body
            self.is_complete = self._left == 0
        else:
            self.keeps_open = False
            self._step = AnswerFraming._open_body

    def _sized_body(self, data: bytes, at: int) -> int:
        end = self._take(data, at)
        self.is_complete = self._left == 0
        return end

    def _open_body(self, data: bytes, at: int) -> int:
        self.parts.append(data[at:])
        return len(data)

    def _chunk(self, data: bytes, at: int) -> int:
        match = _CHUNK_LINE.match(data, at)
        if match is None:
            raise BadFraming("a malformed chunk")
        if match[2] != _CRLF:
            self._rest = data[at:]
            return len(data)
        size, start = int(match[1], 16), match.end()
        if size == 0:
            self._step = AnswerFraming._trailer
            return start
        end = start + size
        if data[end : end + 2] == _CRLF:
            self.parts.append(data[start:end])
            return end + 2
        self._left = size
        self._step = AnswerFraming._chunk_data
        return start

    def _chunk_data(self, data: bytes, at: int) -> int:
        end = self._take(data, at)
        if self._left == 0:
            self._step = AnswerFraming._chunk_end
        return end

    def _chunk_end(self, data: bytes, at: int) -> int:
        found = data[at : at + 2]
        if found == _CRLF:
            self._step = AnswerFraming._chunk
        elif found == b"\r":
            self._rest = found
        else:
            raise BadFraming("a chunk that is longer than it says")
        return at + len(found)

    def _trailer(self, data: bytes, at: int) -> int:
        match = _TRAILER.match(data, at)
        end = match.end() if match is not None else len(data)
        # Nothing is left of a body here: the counter serves the trailers.
        if self._left + end - at > MAX_TRAILER_BYTES:
            raise BadFraming(f"trailers over {MAX_TRAILER_BYTES} bytes")
        if match is not None:
            self.is_complete = match[0] == _CRLF
            self._left += end - at
        elif _BAD_LINE_END.search(data, at) or data.find(_CRLF, at) >= 0:
            raise BadFraming("a malformed trailer")
        else:
            self._rest = data[at:]
        return end

    def _take(self, data: bytes, at: int) -> int:
        part = data[at : at + self._left]
        self.parts.append(part)
        self._left -= len(part)
        return at + len(part)


_Step = Callable[[AnswerFraming, bytes, int], int]


def _steering(fields: bytes) -> dict[bytes, bytes]:
    """The fields that decide where an answer ends, lower case. A list in two lines is one value, and as such no length."""
    found: dict[bytes, bytes] = {}
    for line in fields.lower().split(_CRLF):
        name, _, value = line.partition(b":")
        if name in _STEERING:
            value = value.strip(b"\t ")
            found[name] = found[name] + b", " + value if name in found else value
    return found


def _check_interim(status: int, steering: dict[bytes, bytes]) -> None:
    """An interim answer is a head and nothing else; one that takes the connection over was never asked for."""
    if status == _SWITCHING_PROTOCOLS:
        raise BadFraming("a switch of protocols that nobody asked for")
    if b"content-length" in steering or b"transfer-encoding" in steering:
        raise BadFraming("an interim answer with a body")
