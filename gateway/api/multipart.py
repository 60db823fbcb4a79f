"""Read a multipart form as a stream: named parts only, each with its own cap, files straight to disk, nothing unbounded in memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from ..datasets.sink import FileSink, Received
from ..errors import Invalid, TooLarge

_MAX_HEADERS = 8
_MAX_HEADER_BYTES = 2_048
_OVERHEAD_BYTES = 64 * 2**10  # boundaries and headers of all parts together
_PATH_CHARACTERS = frozenset("/\\\0")


@dataclass(frozen=True, slots=True)
class TextPart:
    """A short field, kept in memory."""

    limit_bytes: int


@dataclass(frozen=True, slots=True)
class FilePart:
    """A file, streamed to where `open_sink` says."""

    limit_bytes: int
    open_sink: Callable[[], FileSink]


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """A file that arrived whole."""

    filename: str | None
    received: Received


@dataclass(slots=True)
class Form:
    """What arrived."""

    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, ReceivedFile] = field(default_factory=dict)

    def text(self, name: str) -> str:
        """A field that must be there."""
        if name not in self.texts:
            raise Invalid(f"the form has no field {name!r}", code="missing_field", param=name)
        return self.texts[name]

    def file(self, name: str) -> ReceivedFile:
        """A file that must be there."""
        if name not in self.files:
            raise Invalid(f"the form has no file {name!r}", code="missing_file", param=name)
        return self.files[name]


@asynccontextmanager
async def received_form(request: Request, parts: Mapping[str, TextPart | FilePart]) -> AsyncIterator[Form]:
    """The form's parts; their files are removed when the block ends, unless moved elsewhere meanwhile.

    Raises `Invalid` for a part of another name, a repeat, a path as file name, or a body that ends too early;
    `TooLarge` over a cap.
    """
    reader = _Reader(parts)
    try:
        await reader.read(request)
        yield reader.form
    finally:
        reader.abort()


class _Reader:
    """Callbacks of the parser collect what happened in one chunk; then it is acted upon, where waiting is allowed."""

    def __init__(self, parts: Mapping[str, TextPart | FilePart]) -> None:
        self.form = Form()
        self._parts = parts
        self._limit = sum(part.limit_bytes for part in parts.values()) + _OVERHEAD_BYTES
        self._events: list[tuple[str, bytes]] = []
        self._header_name = self._header_value = b""
        self._disposition = b""
        self._ended = False
        self._name = ""
        self._filename: str | None = None
        self._text = bytearray()
        self._sink: FileSink | None = None
        self._sinks: list[FileSink] = []

    async def read(self, request: Request) -> None:
        """Consume the body."""
        kind, options = parse_options_header(request.headers.get("content-type"))
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise Invalid("send the files as multipart/form-data", code="not_multipart")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._limit:
            raise self._too_large()
        seen = 0
        try:
            parser = self._parser(boundary)
            async for chunk in request.stream():
                seen += len(chunk)
                if seen > self._limit:
                    raise self._too_large()
                parser.write(chunk)
                await self._act()
        except FormParserError as error:
            raise Invalid("the multipart body is malformed", code="bad_multipart") from error
        except ClientDisconnect as error:
            raise Invalid(
                "the connection closed before the whole body had arrived", code="upload_incomplete"
            ) from error
        if not self._ended:
            raise Invalid("the multipart body ends before its closing boundary", code="upload_incomplete")

    def abort(self) -> None:
        """Remove what was not moved elsewhere."""
        for sink in self._sinks:
            sink.abort()

    def _parser(self, boundary: bytes) -> MultipartParser:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": lambda: self._events.append(("begin", self._disposition)),
                "on_part_data": lambda data, start, end: self._events.append(("data", bytes(data[start:end]))),
                "on_part_end": lambda: self._events.append(("end", b"")),
                "on_end": lambda: self._events.append(("finished", b"")),
            },
            max_header_count=_MAX_HEADERS,
            max_header_size=_MAX_HEADER_BYTES,
        )

    def _on_part_begin(self) -> None:
        self._header_name = self._header_value = self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    async def _act(self) -> None:
        events, self._events = self._events, []
        for event, data in events:
            match event:
                case "begin":
                    self._begin(data)
                case "data":
                    await self._data(data)
                case "end":
                    await self._end()
                case _:
                    self._ended = True

    def _begin(self, disposition: bytes) -> None:
        _, options = parse_options_header(disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        part = self._parts.get(self._name)
        if part is None:
            allowed = ", ".join(self._parts)
            raise Invalid(
                f"the form has a part {self._name[:60]!r}; send only {allowed}",
                code="unknown_part",
                param=self._name[:60],
            )
        if self._name in self.form.texts or self._name in self.form.files:
            raise Invalid(f"the form has the part {self._name!r} twice", code="duplicate_part", param=self._name)
        self._filename = _filename(options, self._name)
        self._text = bytearray()
        self._sink = None
        if isinstance(part, FilePart):
            self._sink = part.open_sink()
            self._sinks.append(self._sink)

    async def _data(self, data: bytes) -> None:
        if self._sink is not None:
            await self._sink.write(data)
            return
        self._text += data
        limit = self._parts[self._name].limit_bytes
        if len(self._text) > limit:
            raise TooLarge(f"the field {self._name!r} is larger than {limit} bytes", param=self._name)

    async def _end(self) -> None:
        if self._sink is not None:
            self.form.files[self._name] = ReceivedFile(self._filename, await self._sink.finish())
            return
        try:
            self.form.texts[self._name] = self._text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Invalid(f"the field {self._name!r} is not UTF-8", code="bad_field", param=self._name) from error

    def _too_large(self) -> TooLarge:
        return TooLarge(f"the body is larger than the {self._limit:,} bytes that are allowed here")


def _filename(options: Mapping[bytes, bytes], name: str) -> str | None:
    """The client's word for a file; one that looks like a path means a client that expects us to use it as one."""
    if b"filename" not in options and b"filename*" not in options:
        return None
    filename = options.get(b"filename", options.get(b"filename*", b"")).decode("utf-8", "replace")
    if _PATH_CHARACTERS & set(filename) or filename in (".", ".."):
        raise Invalid(f"the file name {filename[:80]!r} is a path; send a plain name", code="bad_filename", param=name)
    return filename
