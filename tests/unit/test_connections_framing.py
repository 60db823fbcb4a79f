"""The framer: the same bytes are the same events however they were cut, and what two readers could take for two things is refused."""

from __future__ import annotations

from itertools import pairwise

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.connections import framing
from gateway.connections.framing import End, Event, Framer
from gateway.connections.heads import Head, Refusal, route_path
from tests.framing.corpus import corpus
from tests.framing.rows import Row, planted

HEAD = b"GET /a?b=c HTTP/1.1\r\nHost: h\r\n"
POST = b"POST /a HTTP/1.1\r\nHost: h\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SMALL_ROWS = [row for row in corpus("tn-k", planted("tn-k")) if len(row.sent) < 1500]


def events_of(*pieces: bytes) -> list[Event]:
    """Every event; neighbouring parts of a body are one."""
    framer = Framer()
    found: list[Event] = []
    for piece in pieces:
        framer.feed(piece)
        while (event := framer.next()) is not None:
            if isinstance(event, bytes) and found and isinstance(found[-1], bytes):
                found[-1] += event
            else:
                found.append(event)
    return found


def cut(data: bytes, at: list[int]) -> list[bytes]:
    """The data in pieces."""
    bounds = [0, *sorted({place % (len(data) + 1) for place in at}), len(data)]
    return [data[start:end] for start, end in pairwise(bounds)]


def refusal_of(data: bytes) -> Refusal:
    """The refusal at the end; nothing else follows."""
    last = events_of(data)[-1]
    assert isinstance(last, Refusal)
    return last


def head_of(data: bytes) -> Head:
    """The only head."""
    first = events_of(data)[0]
    assert isinstance(first, Head)
    return first


# ---- However it is cut


@settings(max_examples=300, deadline=None)
@given(row=st.sampled_from(SMALL_ROWS), at=st.lists(st.integers(0, 1500), max_size=12))
def test_an_odd_request_is_the_same_however_it_is_cut(row: Row, at: list[int]) -> None:
    assert events_of(*cut(row.sent, at)) == events_of(row.sent)


@pytest.mark.parametrize("family", sorted({row.family for row in SMALL_ROWS}))
def test_byte_by_byte_every_odd_request_is_the_same(family: str) -> None:
    different = [
        row.label
        for row in SMALL_ROWS
        if row.family == family
        and events_of(*[row.sent[at : at + 1] for at in range(len(row.sent))]) != events_of(row.sent)
    ]

    assert different == []


PIECES = st.sampled_from([
    b"GET", b"POST", b" ", b"/", b"/a", b" HTTP/1.1", b"\r\n", b"\r", b"\n", b"\r\n\r\n", b"Host: h\r\n", b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n", b"0\r\n", b"0\r\n\r\n", b"3\r\nabc\r\n", b"abc", b"X: y\r\n", b": ", b"\x00", b"\xff", b"\t",
    HEAD + b"\r\n", POST + b"Content-Length: 3\r\n\r\nabc", CHUNKED, CHUNKED + b"3\r\nabc\r\n0\r\n\r\n", b"Connection: close\r\n", b"5",
    b";x", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n", b"PRI * HTTP/2.0\r\n\r\n",
])  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(
    data=st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=12).map(b"".join)),
    at=st.lists(st.integers(0, 400), max_size=12),
)
def test_any_bytes_are_the_same_however_they_are_cut(data: bytes, at: list[int]) -> None:
    assert events_of(*cut(data, at)) == events_of(data)


@settings(max_examples=200, deadline=None)
@given(data=st.lists(PIECES, max_size=12).map(b"".join), at=st.lists(st.integers(0, 400), max_size=12))
def test_limits_fall_on_the_same_byte_however_it_is_cut(data: bytes, at: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(framing, "MAX_LINE_BYTES", 24)
        patch.setattr(framing, "MAX_HEAD_BYTES", 60)
        patch.setattr(framing, "MAX_FIELDS", 2)
        patch.setattr(framing, "MAX_SIZE_LINE_BYTES", 4)

        assert events_of(*cut(data, at)) == events_of(data)


@settings(max_examples=200, deadline=None)
@given(data=st.lists(PIECES, max_size=12).map(b"".join), more=st.binary(max_size=50))
def test_nothing_comes_after_a_refusal(data: bytes, more: bytes) -> None:
    events = events_of(data, b"\x00\r\n\x00", HEAD + b"\r\n", more)
    refused = [at for at, event in enumerate(events) if isinstance(event, Refusal)]

    assert refused in ([], [len(events) - 1])


# ---- Beside another framer


TOKENS = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGH0123456789-_", min_size=1, max_size=12)
VALUES = st.text([chr(code) for code in range(33, 127)] + ["é"], min_size=0, max_size=20)
NAMES = TOKENS.filter(lambda name: name.lower() not in ("host", "expect", "upgrade", "connection", "origin"))


@settings(max_examples=300, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"]),
    path=st.text("abc/123-_.~:@!$&'()*+,;=?", max_size=20),
    headers=st.lists(st.tuples(NAMES, VALUES), max_size=6),
    body=st.binary(max_size=60),
    chunks=st.lists(st.integers(1, 20), max_size=4),
    is_chunked=st.booleans(),
)
def test_a_good_request_is_what_h11_takes_it_for(
    method: str, path: str, headers: list[tuple[str, str]], body: bytes, chunks: list[int], *, is_chunked: bool
) -> None:
    lines = [f"{method} /{path} HTTP/1.1", "Host: localhost", *[f"X-{name}: {value}" for name, value in headers]]
    lines.append("Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(body)}")
    sent = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + (in_chunks(body, chunks) if is_chunked else body)
    other = h11.Connection(h11.SERVER)
    other.receive_data(sent)
    request = other.next_event()
    theirs = b""
    while isinstance(event := other.next_event(), h11.Data):
        theirs += bytes(event.data)

    head, *rest = events_of(sent)

    assert isinstance(request, h11.Request)
    assert isinstance(head, Head)
    assert (head.method.encode(), head.target) == (request.method, request.target)
    assert head.headers == [(bytes(name), bytes(value)) for name, value in request.headers]
    assert rest == ([body, End.END] if body else [End.END])
    assert theirs == body


def in_chunks(body: bytes, sizes: list[int]) -> bytes:
    parts = []
    for size in sizes:
        part, body = body[:size], body[size:]
        if part:
            parts.append(b"%X\r\n%b\r\n" % (len(part), part))
    if body:
        parts.append(b"%x\r\n%b\r\n" % (len(body), body))
    return b"".join(parts) + b"0\r\n\r\n"


# ---- What a head says


def test_names_are_lower_case_and_values_trimmed() -> None:
    head = head_of(HEAD + b"X-Ab: \t c d \t\r\n\r\n")

    assert head.headers == [(b"host", b"h"), (b"x-ab", b"c d")]
    assert (head.method, head.target, head.version, head.body_bytes) == ("GET", b"/a?b=c", "1.1", 0)


@pytest.mark.parametrize(
    ("version", "options", "keeps_alive"),
    [
        (b"1.1", b"", True),
        (b"1.1", b"Connection: x, CLOSE\r\n", False),
        (b"1.1", b"Connection: keep-alive\r\n", True),
        (b"1.0", b"", False),
        (b"1.0", b"Connection: keep-alive\r\n", False),
    ],
)
def test_a_connection_lives_on_in_http_1_1_unless_it_is_told_not_to(
    version: bytes, options: bytes, keeps_alive: bool
) -> None:
    assert head_of(b"GET / HTTP/" + version + b"\r\nHost: h\r\n" + options + b"\r\n").keeps_alive is keeps_alive


def test_trailers_are_no_headers_and_no_part_of_the_body() -> None:
    head, *rest = events_of(CHUNKED + b"3\r\nabc\r\n0\r\nAuthorization: Bearer x\r\nConnection: close\r\n\r\n")

    assert isinstance(head, Head)
    assert head.keeps_alive
    assert b"authorization" not in dict(head.headers)
    assert rest == [b"abc", End.END]


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "Host"),
        (HEAD + b"Content-Length: 1x\r\n\r\n", "1x"),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", "gzip"),
        (HEAD + b"A b: c\r\n\r\n", "A b: c"),
        (HEAD + b"Authorization: a\r\nauthorization: b\r\n\r\n", "authorization"),
        (b"GET a HTTP/1.1\r\nHost: h\r\n\r\n", "must begin with `/`"),
        (b"GET / HTTP/2.0\r\nHost: h\r\n\r\n", "use HTTP/1.1"),
        (HEAD + b"Expect: tea\r\n\r\n", "tea"),
    ],
)
def test_a_refusal_names_what_is_wrong(sent: bytes, says: str) -> None:
    assert says in refusal_of(sent).message


def test_a_refusal_shows_little_of_what_was_sent() -> None:
    assert len(refusal_of(HEAD + b"Content-Length: " + b"x" * 9000 + b"\r\n\r\n").message) < 200


# ---- What it keeps


def test_a_framer_holds_what_it_was_not_asked_for_and_no_more() -> None:
    framer = Framer()
    framer.feed(HEAD + b"\r\n" + HEAD)
    while framer.next() is not End.END:
        pass

    assert framer.pending == len(HEAD)


def test_a_body_is_handed_on_at_once() -> None:
    framer = Framer()
    framer.feed(POST + b"Content-Length: 1000000\r\n\r\n")
    framer.next()
    for _ in range(9):
        framer.feed(b"x" * 100_000)
        assert len(framer.next() or b"") == 100_000  # type: ignore[arg-type]
        assert framer.pending == 0


def test_of_many_small_chunks_others_have_their_turn_in_between() -> None:
    framer = Framer()
    framer.feed(CHUNKED + b"1\r\nx\r\n" * 10_000)
    framer.next()

    first = framer.next()

    assert isinstance(first, bytes)
    assert len(first) < 1_000
    assert framer.pending > 50_000


# ---- Paths


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"/v1/models/support%403", "/v1/models/support@3"),
        (b"/a%3Ab%2cc", "/a:b,c"),
        (b"/api%2fkeys", "/api%2fkeys"),
        (b"/api/%6beys", "/api/%6beys"),
        (b"/%2e%2e/x", "/%2e%2e/x"),
        (b"/a%00%0d%0a%5c%25%3f%23", "/a%00%0d%0a%5c%25%3f%23"),
        (b"/%c3%a4%20", "/%c3%a4%20"),
        (b"//a/../b", "//a/../b"),
    ],
)
def test_only_what_no_routes_own_words_hold_is_decoded(raw: bytes, path: str) -> None:
    assert route_path(raw) == path
