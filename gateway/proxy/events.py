"""Server-sent events as the HTML standard reads them: fed as they come, given as whole events. Pure.

Lines end in CRLF, LF or CR; `data` may have many lines; comments, `id`, `retry` and unknown fields mean nothing here; an
event that was not finished is none. The result depends on the bytes alone, never on how they were cut.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_EVENT_BYTES = 8 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """What was said, and as what; most events have no kind."""

    kind: bytes
    data: bytes


class EventTooLarge(Exception):
    """An event, or a line of one, without end."""


class EventReader:
    """The events of one stream. After `EventTooLarge` it must not be fed again."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._kind = b""
        self._data: list[bytes] = []
        self._size = 0
        self._is_first_line = True
        self._skips_newline = False
        # Whether nothing has come since the last event.
        self.is_between = True

    def feed(self, content: bytes) -> list[Event]:
        """The events that this completes."""
        if not content:
            return []
        if self._skips_newline:
            content = content.removeprefix(b"\n")
        self._skips_newline = content.endswith(b"\r")
        found = [self._take(line) for line in content.splitlines(keepends=True)]
        return [event for event in found if event is not None]

    def _take(self, line: bytes) -> Event | None:
        self.is_between = False
        text = line.rstrip(b"\r\n")
        is_whole = len(text) < len(line)
        self._count(len(text) + is_whole)
        self._line += text
        if not is_whole:
            return None
        text = bytes(self._line)
        self._line.clear()
        return self._read(text)

    def _count(self, size: int) -> None:
        self._size += size
        if self._size > MAX_EVENT_BYTES:
            raise EventTooLarge(f"an event over {MAX_EVENT_BYTES} bytes")

    def _read(self, line: bytes) -> Event | None:
        if self._is_first_line:
            self._is_first_line = False
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line:
            return self._dispatch()
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._kind = value
        return None

    def _dispatch(self) -> Event | None:
        event = Event(self._kind, b"\n".join(self._data)) if self._data else None
        self._kind = b""
        self._data = []
        self._size = 0
        self.is_between = event is not None
        return event
