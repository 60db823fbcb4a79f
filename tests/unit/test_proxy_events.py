"""Server-sent events, by the rules of the HTML standard."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.proxy.events import MAX_EVENT_BYTES, Event, EventReader, EventTooLarge

_WORDS = [
    b"data",
    b"event",
    b"id",
    b"retry",
    b":",
    b": ",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"x",
    b" ",
    b"\xef\xbb\xbf",
    b"\xc3\xa9",
]


def by_the_standard(content: bytes) -> list[Event]:
    """The standard's algorithm, word for word, on bytes that are all there."""
    events, kind, data = [], b"", b""
    lines = re.split(rb"\r\n|\n|\r", content.removeprefix(b"\xef\xbb\xbf"))[:-1]
    for line in lines:
        if not line:
            if data:
                events.append(Event(kind, data[:-1]))
            kind, data = b"", b""
        elif b":" in line:
            name, value = line.split(b":", 1)
            value = value[1:] if value[:1] == b" " else value
            kind = value if name == b"event" else kind
            data += value + b"\n" if name == b"data" else b""
        else:
            kind = b"" if line == b"event" else kind
            data += b"\n" if line == b"data" else b""
    return events


@given(words=st.lists(st.sampled_from(_WORDS), max_size=40), cuts=st.lists(st.integers(0, 120), max_size=20))
def test_events_are_the_standards_wherever_they_are_cut(words: list[bytes], cuts: list[int]) -> None:
    content = b"".join(words)
    places = [0, *sorted(min(place, len(content)) for place in cuts), len(content)]
    reader = EventReader()

    found = [event for start, end in pairwise(places) for event in reader.feed(content[start:end])]

    assert found == by_the_standard(content)


@pytest.mark.parametrize(
    ("content", "is_between"),
    [
        (b"data: x\n\n", True),
        (b"data: x\r\n\r\n", True),
        (b"data: x\n\n\n", False),
        (b"data: x\n\n: comment\n\n", False),
        (b"data: x\n\nd", False),
        (b"data: x\n", False),
    ],
)
def test_what_comes_behind_an_event_is_noticed(content: bytes, *, is_between: bool) -> None:
    reader = EventReader()

    assert len(reader.feed(content)) == (1 if content.count(b"\n") > 1 else 0)
    assert reader.is_between == is_between


@pytest.mark.parametrize(
    "line", [b"data: " + b"x" * 1000 + b"\n", b": comment " * 100 + b"\n", b"x" * 1000, b"data\n" * 200]
)
def test_an_event_without_end_is_given_up(line: bytes) -> None:
    reader = EventReader()
    reader.feed(line * 10)

    with pytest.raises(EventTooLarge):
        reader.feed(line * (MAX_EVENT_BYTES // len(line)))


def test_events_that_end_may_go_on_for_ever() -> None:
    reader = EventReader()
    event = b"data: " + b"x" * 2**20 + b"\n\n"

    assert sum(len(reader.feed(event)) for _ in range(20)) == 20
