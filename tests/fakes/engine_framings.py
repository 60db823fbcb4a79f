"""What a misbehaving engine may answer, byte for byte, with what the client must get and what becomes of the connection."""

from __future__ import annotations

from dataclasses import dataclass

from .raw_engine import Asked, Script, chunked, foreign, good, head, sized

_JSON = "content-type: application/json"
_CHUNKED = "transfer-encoding: chunked"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Framing:
    """One way to answer."""

    name: str
    script: Script
    is_own: bool
    """Whether the client gets its answer; else an error, and never a `[DONE]`."""
    is_reused: bool | None
    """Whether the connection takes the next request; None: that depends on how the answer is cut."""
    is_stream: bool = False
    closes: bool = False


def _kept(name: str, script: Script, *, closes: bool = False) -> Framing:
    return Framing(name, script, is_own=True, is_reused=not closes, closes=closes)


def _dropped(name: str, script: Script, *, closes: bool = False) -> Framing:
    return Framing(name, script, is_own=True, is_reused=False, closes=closes)


def _refused(name: str, script: Script, *, closes: bool = False) -> Framing:
    return Framing(name, script, is_own=False, is_reused=False, closes=closes)


def _status(line: str) -> Script:
    return lambda asked: sized(asked.whole(), status=line)


def _fields(*fields: str) -> Script:
    return lambda asked: sized(asked.whole(), *fields)


def _lengths(*values: str) -> Script:
    """These lengths in place of the right one; `N` stands for it."""

    def script(asked: Asked) -> bytes:
        body = asked.whole()
        return head(*(f"content-length: {value.replace('N', str(len(body)))}" for value in values)) + body

    return script


def _codings(*values: str, status: str = "HTTP/1.1 200 OK") -> Script:
    """These codings over a body that is chunked."""
    return lambda asked: head(*(f"transfer-encoding: {value}" for value in values), status=status) + _chunks(asked)


def _chunks(asked: Asked) -> bytes:
    return chunked([asked.whole()]).partition(b"\r\n\r\n")[2]


def _one_chunk(size: str, *, end: bytes = b"\r\n0\r\n\r\n") -> Script:
    """A chunk that announces this size; `N` stands for the right one."""

    def script(asked: Asked) -> bytes:
        body = asked.whole()
        return head(_CHUNKED) + size.replace("N", f"{len(body):x}").encode("latin-1") + b"\r\n" + body + end

    return script


def _cut(script: Script, bytes_short: int) -> Script:
    return lambda asked: script(asked)[:-bytes_short]


def _before(prefix: bytes, script: Script = good) -> Script:
    return lambda asked: prefix + script(asked)


def _behind(suffix: bytes, script: Script = good) -> Script:
    return lambda asked: script(asked) + suffix


def _instead(old: bytes, new: bytes, script: Script = good) -> Script:
    def replaced(asked: Asked) -> bytes:
        content = script(asked)
        assert old in content
        return content.replace(old, new)

    return replaced


_HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </x>; rel=preload\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

WHOLE = (
    # ---- Right, if odd: answered, and the connection is used again
    _kept("plain", good),
    _kept("a 103 before it", _before(_HINTS)),
    _kept("three 100s and a 102 before it", _before(_CONTINUE * 3 + b"HTTP/1.1 102 Processing\r\n\r\n")),
    _kept("chunked", lambda asked: chunked([asked.whole()])),
    _kept("chunks of a byte", lambda asked: chunked(bytes([byte]) for byte in asked.whole())),
    _kept("chunk extensions", _one_chunk('N;a="b";c')),
    _kept("a chunk size with zeros and capitals", lambda asked: _one_chunk(f"00{len(asked.whole()):X}")(asked)),
    _kept("a last chunk of many zeros", lambda asked: chunked([asked.whole()], end=b"0000;last\r\n\r\n")),
    _kept("trailers", lambda asked: chunked([asked.whole()], end=b"0\r\nx-a: 1\r\ncontent-length: 5\r\n\r\n")),
    _kept("a trailer that says close", lambda asked: chunked([asked.whole()], end=b"0\r\nconnection: close\r\n\r\n")),
    _kept("space around values", _lengths(" \t N \t ")),
    _kept("names in capitals", lambda asked: head(f"CONTENT-LENGTH:{len(asked.whole())}") + asked.whole()),
    _kept("a reason that is empty", _status("HTTP/1.1 200 ")),
    _kept("a reason in Latin", _status("HTTP/1.1 200 c'est \xe9gal")),
    _kept("keep-alive said", _fields("connection: Keep-Alive", "keep-alive: timeout=1", _JSON)),
    _kept("an Upgrade offered", _fields("upgrade: h2c")),
    _kept("a field with no value", _fields("x-empty:", "server: raw")),
    # ---- Right, and the last answer of its connection
    _dropped("connection: close", _fields("connection: close")),
    _dropped("connection: close among others", _fields("connection: keep-alive, Close")),
    _dropped("two lines of connection", _fields("connection: keep-alive", "connection: close")),
    _dropped("connection: upgrade", _fields("connection: upgrade", "upgrade: h2c")),
    _dropped("close said by an interim answer", _before(b"HTTP/1.1 103 X\r\nconnection: close\r\n\r\n")),
    _dropped("HTTP/1.0", _status("HTTP/1.0 200 OK")),
    _dropped("HTTP/1.0 that would be kept", lambda asked: sized(asked.whole(), "connection: keep-alive", status="HTTP/1.0 200 OK")),
    _dropped("no framing, closed", lambda asked: head(_JSON) + asked.whole(), closes=True),
    _dropped("framed, closed", good, closes=True),
    _dropped("another answer behind it", lambda asked: good(asked) + foreign(asked)),
    _dropped("another answer behind chunks", lambda asked: chunked([asked.whole()]) + foreign(asked)),
    _dropped("another answer behind a 103 and it", lambda asked: _HINTS + good(asked) + foreign(asked)),
    _dropped("a line end behind it", _behind(b"\r\n")),
    _dropped("a byte behind it", _behind(b"x")),
    _dropped("an interim answer behind it", _behind(_CONTINUE)),
    _dropped("half a head behind it", _behind(b"HTTP/1.1 200 OK\r\ncontent-le")),
    # ---- Wrong
    _refused("nothing", lambda asked: b"", closes=True),
    _refused("garbage", lambda asked: b"\x16\x03\x01garbage\r\n\r\n"),
    _refused("only an interim answer", lambda asked: _CONTINUE, closes=True),
    _refused("an interim answer with a length", _before(b"HTTP/1.1 103 X\r\ncontent-length: 4\r\n\r\nbody")),
    _refused("an interim answer in chunks", _before(b"HTTP/1.1 103 X\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n")),
    _refused("endless interim answers", _before(_HINTS * 2000)),
    _refused("a switch of protocols", _before(b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")),
    _refused("a line end before it", _before(b"\r\n")),
    _refused("HTTP/2", _status("HTTP/2.0 200 OK")),
    _refused("HTTP/1.2", _status("HTTP/1.2 200 OK")),
    _refused("HTTP/1.10", _status("HTTP/1.10 200 OK")),
    _refused("http/1.1", _status("http/1.1 200 OK")),
    _refused("ICY", _status("ICY 200 OK")),
    _refused("a status of two digits", _status("HTTP/1.1 20 OK")),
    _refused("a status of four digits", _status("HTTP/1.1 2000 OK")),
    _refused("a status below 100", _status("HTTP/1.1 099 OK")),
    _refused("a status above 599", _status("HTTP/1.1 600 OK")),
    _refused("a status with a sign", _status("HTTP/1.1 +20 OK")),
    _refused("no space after the status", _status("HTTP/1.1 200")),
    _refused("two spaces before the status", _status("HTTP/1.1  200 OK")),
    _refused("a tab before the status", _status("HTTP/1.1\t200 OK")),
    _refused("a control character in the reason", _status("HTTP/1.1 200 O\x00K")),
    _refused("lines that end in LF", lambda asked: good(asked).replace(b"\r\n", b"\n")),
    _refused("one line that ends in LF", _instead(b"200 OK\r\n", b"200 OK\n")),
    _refused("a head that ends in LF", _instead(b"\r\n\r\n", b"\n\n")),
    _refused("a CR within a line", _fields("x-a: b\rcontent-length: 3")),
    _refused("a folded line", _fields("x-a: b\r\n c")),
    _refused("a folded first line", lambda asked: head(" x: y", f"content-length: {len(asked.whole())}") + asked.whole()),
    _refused("space before a colon", lambda asked: head(f"content-length : {len(asked.whole())}") + asked.whole()),
    _refused("no colon", _fields("x-a")),
    _refused("no name", _fields(": x")),
    _refused("a NUL in a value", _fields("x-a: a\x00b")),
    _refused("a letter that is none in a name", _fields("x-\xe9: b")),
    _refused("a head of 70 kB in one field", _fields("x-a: " + "y" * 70_000)),
    _refused("a head of 70 kB in many fields", _fields(*["x-a: b"] * 9_000)),
    _refused("30 MB of head", lambda asked: head(*["x-a: " + "y" * 1000] * 30_000) + asked.whole()),
    _refused("a length and chunks", lambda asked: chunked([asked.whole()], "content-length: 5")),
    _refused("chunks and a length", _lengths("N\r\ntransfer-encoding: chunked")),
    _refused("two lengths", _lengths("N", "5")),
    _refused("two lengths that agree", _lengths("N", "N")),
    _refused("a list of lengths", _lengths("N, N")),
    _refused("a length with a sign", _lengths("+N")),
    _refused("a length below nothing", _lengths("-1")),
    _refused("a length in hex", _lengths("0xN")),
    _refused("a length with a dot", _lengths("N.0")),
    _refused("a length with a gap", _lengths("1 N")),
    _refused("an empty length", _lengths("")),
    _refused("a length beyond all", _lengths("9" * 40)),
    _refused("a length in other digits", _lengths("\xb2N")),
    _refused("gzip, chunked", _codings("gzip, chunked")),
    _refused("chunked twice", _codings("chunked, chunked")),
    _refused("chunked in two lines", _codings("chunked", "chunked")),
    _refused("identity", _codings("identity")),
    _refused("xchunked", _codings("xchunked")),
    _refused("chunked with a parameter", _codings("chunked;a=b")),
    _refused("an empty coding", _codings("")),
    _refused("chunked in HTTP/1.0", _codings("chunked", status="HTTP/1.0 200 OK")),
    _refused("a size that is no number", _one_chunk("zz")),
    _refused("a size with a prefix", _one_chunk("0xN")),
    _refused("a size with a sign", _one_chunk("-N")),
    _refused("a size with space before", _one_chunk(" N")),
    _refused("a size with space behind", _one_chunk("N ")),
    _refused("an empty size", _one_chunk("")),
    _refused("a size beyond all", _one_chunk("f" * 17)),
    _refused("a control character in an extension", _one_chunk("N;a=\x01")),
    _refused("an extension without end", _one_chunk("N;" + "a" * 70_000)),
    _refused("a size line that ends in LF", _instead(b"\r\n{", b"\n{", lambda asked: chunked([asked.whole()]))),
    _refused("a chunk that ends in LF", _one_chunk("N", end=b"\n0\r\n\r\n")),
    _refused("a chunk without end", _one_chunk("N", end=b"0\r\n\r\n")),
    _refused("a chunk that is longer than it says", lambda asked: _one_chunk(f"{len(asked.whole()) - 1:x}")(asked)),
    _refused("a chunk that is shorter than it says", lambda asked: _one_chunk(f"{len(asked.whole()) + 2:x}")(asked), closes=True),
    _refused("a trailer that is no field", lambda asked: chunked([asked.whole()], end=b"0\r\nx\r\n\r\n")),
    _refused("a trailer that ends in LF", lambda asked: chunked([asked.whole()], end=b"0\r\nx: y\n\r\n")),
    _refused("trailers of 70 kB", lambda asked: chunked([asked.whole()], end=b"0\r\n" + b"x: y\r\n" * 12_000 + b"\r\n")),
    _refused("another answer in place of the last chunk", lambda asked: chunked([asked.whole()], end=b"") + foreign(asked)),
    _refused("cut in the head", lambda asked: good(asked)[:30], closes=True),
    _refused("cut in the body", _cut(good, 5), closes=True),
    _refused("cut in a chunk", _cut(lambda asked: chunked([asked.whole()]), 12), closes=True),
    _refused("cut before the last chunk", lambda asked: chunked([asked.whole()], end=b""), closes=True),
    _refused("cut in the last line", _cut(lambda asked: chunked([asked.whole()]), 2), closes=True),
    _refused("no framing, cut", lambda asked: head(_JSON) + asked.whole()[:-5], closes=True),
    _refused("no content", _status("HTTP/1.1 204 No Content")),
    _refused("not modified", _status("HTTP/1.1 304 Not Modified")),
    _refused("another place", _status("HTTP/1.1 307 Go")),
    _refused("a refusal of 2 MB", lambda asked: sized(b" " * 2_000_000, status="HTTP/1.1 400 No")),
    _refused("a failure with an answer behind it", lambda asked: sized(b"{}", status="HTTP/1.1 500 No") + foreign(asked)),
    _refused("the answer to another request", foreign),
    _refused("a stream", lambda asked: chunked(asked.events)),
    _refused("counts that are none", lambda asked: sized(asked.whole(usage={"prompt_tokens": "many"}))),
    _refused("counts below nothing", lambda asked: sized(asked.whole(usage={"completion_tokens": -1}))),
    _refused("JSON too deep to be written", lambda asked: sized(asked.whole(x=_deep(500)))),
)  # fmt: skip


def _deep(levels: int) -> list[object]:
    value: list[object] = []
    for _ in range(levels):
        value = [value]
    return value


def _events(change: Script) -> Script:
    """A stream whose bytes are these, in one chunk."""
    return lambda asked: chunked([change(asked)])


def _stream(asked: Asked) -> bytes:
    return b"".join(asked.events)


def _with(extra: bytes, place: int) -> Script:
    """A good stream with more before the event at this place."""
    return _events(lambda asked: b"".join([*asked.events[:place], extra, *asked.events[place:]]))


def _lines(end: bytes) -> Script:
    return _events(lambda asked: _stream(asked).replace(b"\n", end))


def _payloads(change: Script) -> Script:
    """A stream that begins well, goes on with this payload and ends as it should."""
    return lambda asked: _with(b"data: " + change(asked) + b"\n\n", 1)(asked)


def _on_stream(framing: Framing) -> Framing:
    return Framing(
        framing.name, framing.script, framing.is_own, framing.is_reused, is_stream=True, closes=framing.closes
    )


_TWO_LINES = b',\ndata: "object"'
_BAD_UTF8 = b'{"text":"\xff"}'

STREAMS = tuple(
    map(
        _on_stream,
        (
            # ---- Right, if odd
            _kept("plain", good),
            _kept("in one chunk", _events(_stream)),
            _kept("a 103 before it", _before(_HINTS)),
            _kept("sized", lambda asked: sized(_stream(asked))),
            _kept("chunks that cut events and letters", lambda asked: chunked(bytes([b]) for b in _stream(asked))),
            _kept("trailers", lambda asked: chunked(asked.events, end=b"0\r\nx-a: 1\r\n\r\n")),
            _kept("a comment first", _with(b": hello\n\n", 0)),
            _kept("comments between", _with(b":\n\n: ping 0x7f /usr/lib\n\n", 2)),
            _kept("a comment within an event", _events(lambda asked: b": hello\n" + _stream(asked))),
            _kept("a kind that means nothing", _events(lambda asked: b"event: message\n" + _stream(asked))),
            _kept("id, retry and fields unknown", _events(lambda asked: b"id: 7\nretry: 5\nx: y\nz\n" + _stream(asked))),
            _kept("an event without data", _with(b"event: ping\n\n", 1)),
            _kept("an error without data", _with(b"event: error\n\n", 1)),
            _kept("empty lines", _with(b"\n\n\n", 1)),
            Framing("lines that end in CRLF", _lines(b"\r\n"), is_own=True, is_reused=None),
            _kept("lines that end in CR", _lines(b"\r")),
            _kept("no space after the colon", _events(lambda asked: _stream(asked).replace(b"data: ", b"data:"))),
            _kept("data in two lines", _events(_instead(b',"object"', _TWO_LINES, _stream))),
            _kept("a byte order mark", _events(lambda asked: _BOM + _stream(asked))),
            # ---- Right, and the last answer of its connection
            _dropped("connection: close", lambda asked: chunked(asked.events, "connection: close")),
            _dropped("no framing, closed", lambda asked: head() + _stream(asked), closes=True),
            _dropped("another answer behind it", lambda asked: good(asked) + foreign(asked)),
            _dropped("events behind [DONE]", _events(lambda asked: _stream(asked) + b"data: " + asked.chunk("FOREIGN") + b"\n\n")),
            _dropped("chunks behind [DONE]", lambda asked: chunked([*asked.events, b"data: FOREIGN\n\n"])),
            _dropped("a comment behind [DONE]", _events(lambda asked: _stream(asked) + b": FOREIGN\n\n")),
            _dropped("[DONE] twice", lambda asked: chunked([*asked.events, asked.events[-1]])),
            _dropped("an error behind [DONE]", lambda asked: chunked([*asked.events, b'data: {"error":{}}\n\n'])),
            _dropped("cut behind [DONE]", lambda asked: chunked(asked.events, end=b""), closes=True),
            _dropped("a bad chunk behind [DONE]", lambda asked: chunked(asked.events, end=b"zz\r\n")),
            # ---- Wrong
            _refused("an error first", _events(lambda asked: b'event: error\ndata: {"message":"0x7f"}\n\n' + _stream(asked))),
            _refused("an error between", _with(b'event: error\ndata: {"message":"0x7f"}\n\n', 2)),
            _refused("an error that says [DONE]", _with(b"event: error\ndata: [DONE]\n\n", 2)),
            _refused("an error in a chunk", _payloads(lambda asked: b'{"error":{"message":"0x7f"}}')),
            _refused("no [DONE]", lambda asked: chunked(asked.events[:-1])),
            _refused("no [DONE], closed", lambda asked: head() + b"".join(asked.events[:-1]), closes=True),
            _refused("a [DONE] that was not finished", lambda asked: head() + _stream(asked)[:-1], closes=True),
            _refused("a [DONE] in two lines", _events(lambda asked: b"".join(asked.events[:-1]) + b"data: [DO\ndata: NE]\n\n")),
            _refused("a [DONE] in a comment", _events(lambda asked: b"".join(asked.events[:-1]) + b": data: [DONE]\n\n")),
            _refused("a [DONE] with more to say", _payloads(lambda asked: b"[DONE] or not")),
            _refused("nothing but [DONE]", lambda asked: chunked(asked.events[-1:])),
            _refused("nothing at all", lambda asked: chunked([])),
            _refused("nothing but usage cut off", lambda asked: chunked(asked.events[-2:-1])),
            _refused("no JSON", _payloads(lambda asked: b"{broken")),
            _refused("no data in data", _payloads(lambda asked: b"")),
            _refused("a number", _payloads(lambda asked: b"5")),
            _refused("a list", _payloads(lambda asked: b"[" + asked.chunk("x") + b"]")),
            _refused("two chunks in one event", _payloads(lambda asked: asked.chunk("x") + b"," + asked.chunk("y"))),
            _refused("no model", _payloads(lambda asked: b'{"choices":[]}')),
            _refused("no choices", _payloads(lambda asked: asked.chunk("x").replace(b'"choices"', b'"other"'))),
            _refused("choices that are none", _payloads(lambda asked: asked.chunk("x", choices={}))),
            _refused("a choice that is none", _payloads(lambda asked: asked.chunk("x", choices=[5]))),
            _refused("a choice that says nothing", _payloads(lambda asked: asked.chunk("x", choices=[{"index": 0}]))),
            _refused("counts that are none", _payloads(lambda asked: asked.chunk("x", usage={"prompt_tokens": "many"}))),
            _refused("a string that is no text", _payloads(lambda asked: asked.chunk("FILL").replace(b"FILL", b"\xff\xfe"))),
            _refused("a chunk that breaks off", _payloads(lambda asked: asked.chunk("x")[:-1])),
            _refused("another model", _payloads(lambda asked: asked.chunk("x", model="other"))),
            _refused("another answer's chunk", _payloads(lambda asked: asked.chunk("FOREIGN", id="chatcmpl-other"))),
            _refused("another answer's stream", foreign),
            _refused("a bad chunk of HTTP", lambda asked: chunked(asked.events[:3], end=b"zz\r\n")),
            _refused("another answer in place of the last chunk", lambda asked: chunked(asked.events[:3], end=b"") + foreign(asked)),
            _refused("a length and chunks", lambda asked: chunked(asked.events, "content-length: 5")),
            _refused("cut in an event", lambda asked: chunked([_stream(asked)[:300]], end=b""), closes=True),
            _refused("a whole answer", lambda asked: sized(asked.whole())),
            _refused("a page", lambda asked: sized(b"<html>data: hello\n\n</html>")),
        ),
    )
)  # fmt: skip

FRAMINGS = WHOLE + STREAMS
