"""Where an answer begins and ends: the same for the same bytes, however they are cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.engine.framing import MAX_HEAD_BYTES, AnswerFraming, BadFraming
from tests.fakes.engine_framings import FRAMINGS, Framing
from tests.fakes.raw_engine import Asked, chunked, head, sized

ASKED = Asked({"model": "tiny", "request_id": "req-" + "1" * 22, "messages": [{"content": "première"}]})
_MOST_CUTS = 600
_MOST_BYTES = 100_000
# What heads and chunks are made of, so that what is drawn often nearly is an answer.
_WORDS = [
    b"HTTP/1.1 200 OK", b"HTTP/1.1 103 X", b"HTTP/1.0 200 OK", b"HTTP/1.1 204 X", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b":", b" ",
    b"content-length: 3", b"content-length: 0", b"transfer-encoding: chunked", b"connection: close", b"x: y", b"3", b"0", b"3;x=y",
    b"abc", b"\x00",
]  # fmt: skip


@dataclass(frozen=True)
class Read:
    """All that can be told of an answer."""

    status: int
    body: bytes
    is_complete: bool
    is_bad: bool
    is_last: bool


def read(pieces: Iterable[bytes], *, closes: bool = False) -> Read:
    framing = AnswerFraming()
    is_bad = False
    try:
        for piece in pieces:
            framing.feed(piece)
    except BadFraming:
        is_bad = True
    if closes and not is_bad:
        framing.end()
    is_last = framing.has_surplus or not framing.keeps_open
    return Read(framing.status, b"".join(framing.parts), framing.is_complete, is_bad, is_last)


def cut(content: bytes, places: Iterable[int]) -> list[bytes]:
    return [content[start:end] for start, end in pairwise([0, *sorted(places), len(content)])]


@pytest.mark.parametrize("framing", FRAMINGS, ids=lambda framing: framing.name)
def test_where_an_answer_is_cut_does_not_matter(framing: Framing) -> None:
    content = framing.script(ASKED)[:_MOST_BYTES]
    whole = read([content], closes=framing.closes)
    step = max(1, len(content) // _MOST_CUTS)

    for place in range(1, len(content), step):
        assert read(cut(content, [place]), closes=framing.closes) == whole
    assert read(cut(content, range(step, len(content), step)), closes=framing.closes) == whole


@given(words=st.lists(st.sampled_from(_WORDS), max_size=30), cuts=st.lists(st.integers(0, 200), max_size=20))
@example(
    words=[b"HTTP/1.1 103 X", b"\r\n\r\n", b"HTTP/1.1 200 OK", b"\r\n", b"content-length: 3", b"\r\n\r\n", b"abc"],
    cuts=[],
)
@example(words=[b"HTTP/1.1 204 X", b"\r\n\r\n", b"\n"], cuts=[18])
def test_where_anything_is_cut_does_not_matter(words: list[bytes], cuts: list[int]) -> None:
    content = b"".join(words)

    assert read(cut(content, [min(place, len(content)) for place in cuts])) == read([content])


@given(
    body=st.binary(max_size=300),
    parts=st.lists(st.integers(1, 50), max_size=8),
    cuts=st.lists(st.integers(0, 900), max_size=12),
)
def test_a_body_comes_as_it_was_sent(body: bytes, parts: list[int], cuts: list[int]) -> None:
    pieces: list[bytes] = []
    rest = body
    for size in parts:
        pieces, rest = [*pieces, rest[:size]], rest[size:]
    for content in (sized(body), chunked(piece for piece in [*pieces, rest] if piece)):
        found = read(cut(content, [min(place, len(content)) for place in cuts]))

        assert found == Read(200, body, is_complete=True, is_bad=False, is_last=False)


def test_nothing_behind_the_end_is_looked_at() -> None:
    framing = AnswerFraming()

    framing.feed(sized(b"mine") + b"\x00 no answer at all")
    framing.feed(b"nor this")

    assert (framing.parts, framing.is_complete, framing.has_surplus) == ([b"mine"], True, True)


@pytest.mark.parametrize("content", [b"\x16\x03", b"HTTP/2", b"HTTP/1.1 200 OK\n", b"HTTP/1.1 200 OK\r\nx: y\rz"])
def test_what_can_be_no_head_any_more_is_not_waited_for(content: bytes) -> None:
    with pytest.raises(BadFraming):
        AnswerFraming().feed(content)


@pytest.mark.parametrize("size", [b"123456789", b"x", b"1 ", b"1;" + b"x" * 300, b"1\n"])
def test_what_can_be_no_chunk_any_more_is_not_waited_for(size: bytes) -> None:
    framing = AnswerFraming()
    framing.feed(head("transfer-encoding: chunked"))

    with pytest.raises(BadFraming):
        framing.feed(size)


@pytest.mark.parametrize("surplus", [0, 1])
def test_heads_are_bounded_together_to_the_byte(surplus: int) -> None:
    interim = b"HTTP/1.1 103 X\r\n\r\n"
    rest = MAX_HEAD_BYTES - len(interim) - len(sized(b"", "x: "))
    content = interim + sized(b"", "x: " + "y" * (rest + surplus))

    assert read([content]).is_bad == read(cut(content, [20, 60_000])).is_bad == bool(surplus)


def test_an_answer_without_framing_ends_with_its_connection() -> None:
    content = head() + b"a body"

    assert not read([content]).is_complete
    assert read([content], closes=True) == Read(200, b"a body", is_complete=True, is_bad=False, is_last=True)


@pytest.mark.parametrize(
    "content", [sized(b"abc")[:-1], chunked([b"abc"])[:-2], chunked([b"abc"], end=b""), sized(b"abc")[:20], b""]
)
def test_the_end_of_the_connection_completes_nothing_that_has_an_end_of_its_own(content: bytes) -> None:
    assert not read([content], closes=True).is_complete
