"""The head of a request, read strictly: what two readers could take for two things is refused. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import unquote

Headers = list[tuple[bytes, bytes]]

MAX_TARGET_BYTES = 8 * 2**10
# Possessive: what does not match is given up after one look at each byte.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_VALUE = rb"[\t -~\x80-\xff]*+"
# RFC 3986 without `#`, which no request carries, and with the brackets that everybody puts into queries.
_TARGET = rb"/[!$%&'()*+,./0-9:;=?@A-Z\[\]_a-z~-]*"
_METHOD = rb"[A-Z][A-Z-]{0,31}"
_WHOLE = re.compile(rb"(%b) (%b) HTTP/1\.([01])\r\n((?:%b:%b\r\n)*+)\r\n" % (_METHOD, _TARGET, _TOKEN, _VALUE))
_REQUEST_LINE = re.compile(rb"([^ ]+) ([^ ]+) HTTP/([0-9])\.([0-9])")
_METHOD_ALONE = re.compile(_METHOD)
_TARGET_ALONE = re.compile(_TARGET)
_FIELD = re.compile(rb"%b:%b" % (_TOKEN, _VALUE))
_BROKEN_PERCENT = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_LENGTH = re.compile(rb"[0-9]{1,15}")
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_OPTION = re.compile(rb"(?:%b)?" % _TOKEN)
# Said once, or two readers may each believe another one.
_SINGLE = frozenset(
    {
        b"authorization",
        b"content-encoding",
        b"content-length",
        b"content-type",
        b"expect",
        b"host",
        b"idempotency-key",
        b"origin",
        b"transfer-encoding",
        b"x-turnout-key",
    }
)
_NOTED = _SINGLE | {b"connection", b"upgrade"}
# What may come encoded and is decoded. No route's own words hold one of these, so every route has one spelling only:
# what a front lets through or refuses by its path is what is run here.
_DECODED = re.compile(r"(?:%(?:2[146789ABCabc]|3[ABDabd]|40))+")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why nothing more is read from a connection."""

    status: int
    code: str
    message: str


class Head(NamedTuple):
    """A request without its body."""

    method: str
    target: bytes
    version: str
    headers: Headers
    """Names in lower case, values without the space around them."""
    body_bytes: int | None
    """How long the body is; None: it comes in chunks."""
    keeps_alive: bool
    expects_continue: bool

    @property
    def has_body(self) -> bool:
        """Whether a body follows."""
        return self.body_bytes != 0


def read_head(head: bytes) -> Head | Refusal | None:
    """A head with the empty line that ends it; None when a line of it is malformed: `line_refusal` says which."""
    found = _WHOLE.fullmatch(head)
    if found is None:
        return None
    method, target, minor, block = found.groups()
    refusal = _target_refusal(method, target)
    if refusal is not None:
        return refusal
    headers: Headers = []
    noted: dict[bytes, bytes] = {}
    for line in block.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name = name.lower()
        value = value.strip(b" \t")
        headers.append((name, value))
        if name in _NOTED:
            if name not in noted:
                noted[name] = value
            elif name in _SINGLE:
                return _bad(f"the header `{_shown(name)}` stands there twice; send it once", code="bad_header")
            else:
                noted[name] += b"," + value
    return _judged(method.decode(), target, headers, noted, is_1_1=minor == b"1")


def _judged(method: str, target: bytes, headers: Headers, noted: dict[bytes, bytes], *, is_1_1: bool) -> Head | Refusal:
    """What the headers say together."""
    host = noted.get(b"host")
    if host is None and is_1_1:
        return _bad("the header `Host` is missing", code="bad_host")
    if host is not None and _HOST.fullmatch(host) is None:
        return _bad(f"the header `Host` is malformed: {_shown(host)}", code="bad_host")
    length = _body_bytes(noted, is_1_1=is_1_1)
    if isinstance(length, Refusal):
        return length
    options = _options(noted.get(b"connection", b""))
    if options is None:
        return _bad("the header `Connection` is no list of options", code="bad_header")
    if length != 0 and (b"upgrade" in options or b"upgrade" in noted):
        return _bad("an Upgrade with a body is refused; no other protocol is spoken here", code="bad_upgrade")
    expected = noted.get(b"expect")
    if expected is not None and expected.lower() != b"100-continue":
        return Refusal(417, code="bad_expectation", message=f"the expectation {_shown(expected)} cannot be met")
    return Head(
        method,
        target,
        "1.1" if is_1_1 else "1.0",
        headers,
        length,
        # HTTP/1.0 gets a connection for each request: a proxy of its time may pass `keep-alive` on without meaning it.
        keeps_alive=is_1_1 and b"close" not in options,
        expects_continue=expected is not None and is_1_1 and length != 0,
    )


def _body_bytes(noted: dict[bytes, bytes], *, is_1_1: bool) -> int | Refusal | None:
    """The length of the body: 0 where there is none, None for chunks."""
    coding, length = noted.get(b"transfer-encoding"), noted.get(b"content-length")
    if coding is not None:
        if length is not None:
            return _bad("`Transfer-Encoding` beside `Content-Length`; send one of them", code="bad_length")
        if coding.lower() != b"chunked" or not is_1_1:
            return _bad(
                f"`Transfer-Encoding` must be `chunked`, in HTTP/1.1; it is {_shown(coding)}", code="bad_length"
            )
        return None
    if length is None:
        return 0
    if _LENGTH.fullmatch(length) is None:
        return _bad(f"`Content-Length` must be digits; it is {_shown(length)}", code="bad_length")
    return int(length)


def _options(value: bytes) -> set[bytes] | None:
    options = {option.strip(b" \t") for option in value.lower().split(b",")}
    return options if all(_OPTION.fullmatch(option) for option in options) else None


def line_refusal(line: bytes) -> Refusal | None:
    """Why a first line is none, without its end."""
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        return _bad(f"the request line is malformed: {_shown(line)}", code="bad_request_line")
    method, target, major, minor = found.groups()
    if major != b"1" or minor not in (b"0", b"1"):
        version = f"HTTP/{_shown(major)}.{_shown(minor)}"
        return Refusal(505, code="bad_version", message=f"{version} is not spoken here; use HTTP/1.1")
    if _METHOD_ALONE.fullmatch(method) is None:
        return _bad(f"the method is malformed: {_shown(method)}", code="bad_request_line")
    refusal = _target_refusal(method, target)
    if refusal is None and _TARGET_ALONE.fullmatch(target) is None:
        return _bad(
            f"the path must begin with `/`, other characters percent-encoded: {_shown(target)}", code="bad_target"
        )
    return refusal


def _target_refusal(method: bytes, target: bytes) -> Refusal | None:
    if method == b"CONNECT":
        return Refusal(501, code="no_tunnel", message="CONNECT is refused: there is no tunnel here")
    if len(target) > MAX_TARGET_BYTES:
        return Refusal(414, code="target_too_long", message=f"the path and query are over {MAX_TARGET_BYTES} bytes")
    if b"%" in target and _BROKEN_PERCENT.search(target):
        return _bad(f"a `%` in the path or query encodes nothing: {_shown(target)}", code="bad_target")
    return None


def field_refusal(line: bytes) -> Refusal | None:
    """Why a line is no header, without its end."""
    if _FIELD.fullmatch(line) is not None:
        return None
    if line[:1] in (b" ", b"\t"):
        return _bad("a header is folded over two lines; send it in one", code="bad_header")
    return _bad(f"a header line is malformed: {_shown(line)}", code="bad_header")


def route_path(raw: bytes) -> str:
    """The one path that is decided on and routed by.

    Letters, digits, slashes, dots and whatever is no ASCII stay encoded if they came so.
    """
    path = raw.decode("ascii")
    return _DECODED.sub(lambda found: unquote(found[0]), path) if "%" in path else path


def _bad(message: str, *, code: str) -> Refusal:
    return Refusal(400, code, message)


def _shown(value: bytes) -> str:
    return repr(value[:60])[1:]
