"""Where a request begins and ends, decided in one place. Bytes go in, events come out; no clock, no socket.

The events depend on the bytes alone, never on how they were cut into pieces: every refusal is due to the first byte
that cannot be part of a request, or to the first line that is wrong. After a refusal nothing is read any more.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum

from .heads import Head, Refusal, field_refusal, line_refusal, read_head

MAX_HEAD_BYTES = 64 * 2**10
MAX_LINE_BYTES = 16 * 2**10
MAX_FIELDS = 100
MAX_SIZE_LINE_BYTES = 256
# Of one body: nobody says anything in them.
MAX_EXTENSION_BYTES = 16 * 2**10
# Chunks of a byte each cost as much as large ones: after some hundreds of them the caller gets what there is.
_STEPS_AT_ONCE = 3 * 256
_BAD_OCTET = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?=[^\n])|(?<!\r)\n")
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(;[\t -~\x80-\xff]*)?\r")


class End(Enum):
    """The request is whole."""

    END = "end"


class _At(Enum):
    HEAD = 1
    SIZED = 2
    SIZE_LINE = 3
    CHUNK = 4
    CHUNK_END = 5
    TRAILERS = 6
    REFUSED = 7


class _Wait(Enum):
    """More bytes are needed."""

    WAIT = "wait"


Event = Head | bytes | End | Refusal


class Framer:
    """The requests of one connection: a head, parts of its body, the end, the next head."""

    __slots__ = ("_at", "_checked", "_data", "_extension_bytes", "_left", "_line", "_lines", "_skipped_line", "_state")

    def __init__(self) -> None:
        self._state = _At.HEAD
        self._data: bytes | bytearray = b""
        self._at = 0
        # Of the head or the trailers that are being read: where the present line begins, up to where there is no bad
        # octet, how many lines there were.
        self._line = self._checked = self._lines = 0
        self._skipped_line = False
        self._left = 0
        self._extension_bytes = 0

    @property
    def pending(self) -> int:
        """How many bytes wait to be framed."""
        return len(self._data) - self._at

    def feed(self, data: bytes) -> None:
        """More bytes. After a refusal they are dropped."""
        if self._state is _At.REFUSED:
            return
        if self._at == len(self._data):
            self._data = data
        else:
            # What is left is appended to, so that drops cost no more than their own length.
            if isinstance(self._data, bytes):
                self._data = bytearray(memoryview(self._data)[self._at :])
            elif self._at:
                del self._data[: self._at]
            self._data += data
        self._line -= self._at
        self._checked -= self._at
        self._at = 0

    def next(self) -> Event | None:
        """The next event; None: more bytes are needed."""
        state = self._state
        if state is _At.HEAD:
            return self._head()
        if state is _At.SIZED:
            return self._sized()
        if state is _At.TRAILERS:
            return self._trailers()
        if state is _At.REFUSED:
            return None
        return self._chunks()

    # ---- Heads and trailers

    def _head(self) -> Event | None:
        if self._at == len(self._data):
            return None
        if self._checked == self._at:
            end = self._data.find(b"\r\n\r\n", self._at, self._at + MAX_LINE_BYTES)
            # Nearly every head is short, comes in one piece, and is well-formed.
            if end >= 0 and self._data.count(b"\n", self._at, end) <= MAX_FIELDS:
                found = read_head(bytes(self._data[self._at : end + 4]))
                if found is not None:
                    return self._begin(found, end + 4)
        scanned = self._scan(self._head_line_refusal)
        if not isinstance(scanned, int):
            return scanned and self._refuse(scanned)
        found = read_head(bytes(self._data[self._at : scanned]))
        if found is None:
            found = Refusal(400, code="bad_request", message="the request is malformed")
        return self._begin(found, scanned)

    def _begin(self, found: Head | Refusal, end: int) -> Event:
        if isinstance(found, Refusal):
            return self._refuse(found)
        self._move(end)
        self._skipped_line = False
        self._extension_bytes = 0
        self._left = found.body_bytes or 0
        self._state = _At.SIZE_LINE if found.body_bytes is None else _At.SIZED
        return found

    def _trailers(self) -> Event | None:
        """They are held to the rules of headers, and dropped."""
        scanned = self._scan(field_refusal)
        if not isinstance(scanned, int):
            return scanned and self._refuse(scanned)
        self._move(scanned)
        self._state = _At.HEAD
        return End.END

    def _head_line_refusal(self, line: bytes) -> Refusal | None:
        return line_refusal(line) if self._lines == 1 else field_refusal(line)

    def _scan(self, line_refusal: Callable[[bytes], Refusal | None]) -> int | Refusal | None:
        """Where lines end: behind the empty one. None: not yet."""
        while True:
            bound = min(self._line + MAX_LINE_BYTES, self._at + MAX_HEAD_BYTES)
            feed = self._data.find(b"\n", self._checked, bound)
            stop = feed + 1 if feed >= 0 else min(len(self._data), bound)
            # A CR that was last when it was checked is bad if no LF follows.
            if feed == self._line or _BAD_OCTET.search(self._data, max(self._checked - 1, self._line), stop):
                return Refusal(
                    400, code="bad_octet", message="a line holds a control character, or does not end in CR LF"
                )
            if feed < 0:
                self._checked = stop
                return _too_long() if len(self._data) >= bound else None
            line = bytes(self._data[self._line : feed - 1])
            self._line = self._checked = feed + 1
            if not line and not self._may_skip():
                return feed + 1 if self._lines or self._state is _At.TRAILERS else _no_request()
            if line:
                self._lines += 1
                refusal = line_refusal(line)
                if refusal is None and self._lines > MAX_FIELDS + (self._state is _At.HEAD):
                    refusal = _too_many()
                if refusal is not None:
                    return refusal

    def _may_skip(self) -> bool:
        """One empty line before a request is passed over: old clients end their bodies with it."""
        if self._state is not _At.HEAD or self._lines or self._skipped_line:
            return False
        self._at = self._line
        self._skipped_line = True
        return True

    # ---- Bodies

    def _sized(self) -> Event | None:
        if self._left == 0:
            self._move(self._at)
            self._state = _At.HEAD
            return End.END
        return self._take()

    def _take(self) -> bytes | None:
        """What there is of the body, or of its present chunk."""
        have = len(self._data) - self._at
        if have == 0:
            return None
        start = self._at
        if have <= self._left:
            self._left -= have
            self._at += have
            return bytes(self._data if start == 0 else self._data[start:])
        self._at += self._left
        self._left = 0
        return bytes(self._data[start : self._at])

    def _chunks(self) -> Event | None:
        """As much of the body as there is, out of many chunks."""
        parts: list[bytes] = []
        found: Refusal | _Wait | None = None
        for _ in range(_STEPS_AT_ONCE):
            if self._state is _At.SIZE_LINE:
                found = self._size_line()
            elif self._state is _At.CHUNK:
                found = self._chunk(parts)
            elif self._state is _At.CHUNK_END:
                found = self._chunk_end()
            else:
                break
            if found is not None:
                break
        if parts:
            # A refusal is found again, at the same byte.
            return b"".join(parts) if len(parts) > 1 else parts[0]
        if isinstance(found, Refusal):
            return self._refuse(found)
        return self._trailers() if self._state is _At.TRAILERS else None

    def _size_line(self) -> Refusal | _Wait | None:
        feed = self._data.find(b"\n", self._at, self._at + MAX_SIZE_LINE_BYTES)
        if feed < 0:
            if len(self._data) - self._at >= MAX_SIZE_LINE_BYTES:
                return _bad_chunk(f"the size of a chunk takes over {MAX_SIZE_LINE_BYTES} bytes")
            return _Wait.WAIT
        found = _SIZE_LINE.fullmatch(self._data, self._at, feed)
        if found is None:
            return _bad_chunk("the size of a chunk must be 1 to 8 hexadecimal digits, with CR LF behind it")
        extension_bytes = self._extension_bytes + len(found[2] or b"")
        if extension_bytes > MAX_EXTENSION_BYTES:
            return _bad_chunk(f"the extensions of chunks take over {MAX_EXTENSION_BYTES} bytes")
        self._extension_bytes = extension_bytes
        self._left = int(found[1], 16)
        self._move(feed + 1)
        self._state = _At.CHUNK if self._left else _At.TRAILERS
        return None

    def _chunk(self, parts: list[bytes]) -> _Wait | None:
        part = self._take()
        if part is None:
            return _Wait.WAIT
        parts.append(part)
        if self._left == 0:
            self._state = _At.CHUNK_END
        return None

    def _chunk_end(self) -> Refusal | _Wait | None:
        end = bytes(self._data[self._at : self._at + 2])
        if not b"\r\n".startswith(end):
            return _bad_chunk("a chunk is longer than its size")
        if len(end) < 2:
            return _Wait.WAIT
        self._at += 2
        self._state = _At.SIZE_LINE
        return None

    # ---- Steps

    def _move(self, to: int) -> None:
        """Behind what was read; lines are counted from there."""
        self._at = self._line = self._checked = to
        self._lines = 0

    def _refuse(self, refusal: Refusal) -> Refusal:
        self._state = _At.REFUSED
        self._data = b""
        self._at = 0
        return refusal


def _bad_chunk(message: str) -> Refusal:
    return Refusal(400, code="bad_chunk", message=message)


def _too_long() -> Refusal:
    message = f"a header line is over {MAX_LINE_BYTES} bytes, or all together over {MAX_HEAD_BYTES}"
    return Refusal(431, code="headers_too_large", message=message)


def _too_many() -> Refusal:
    return Refusal(431, code="headers_too_large", message=f"there are over {MAX_FIELDS} headers")


def _no_request() -> Refusal:
    return Refusal(400, code="bad_request_line", message="empty lines where a request should begin")
