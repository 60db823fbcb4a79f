"""What other programs say, before clients may read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway.errors import MAX_VALUE_CHARS, quoted, without_internals


@pytest.mark.parametrize(
    "words",
    [
        "",
        "object at 0x7f3a21",
        "No adapter found for /srv/home/artifacts/ab",
        "cannot read C:\\models",
        "Traceback (most recent call last)",
        'File "x.py", line 3',
        "first line\nsecond line",
        "x" * 401,
    ],
)
def test_what_may_hold_internals_is_replaced(words: str) -> None:
    assert without_internals(words, "see the log") == "see the log"


def test_a_plain_sentence_is_kept() -> None:
    said = "LoRA rank 32 is greater than max_lora_rank 16."

    assert without_internals(said, "see the log") == said


# ---- What clients sent, as an error shows it


class Counting(list[Any]):
    """A list that knows how many of its items were looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self.looked_at += 1
            yield item


@pytest.mark.parametrize(
    "value", ["x", "it's", 5, -1.5, True, None, [1, "a"], {"a": [1, {"b": None}]}, [], {}, [[[]]], 2**64]
)
def test_a_short_value_is_shown_as_it_is(value: Any) -> None:
    assert quoted(value) == repr(value)


def nested(depth: int, *, wrap: Callable[[Any], Any]) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = wrap(value)
    return value


# Made in the test: pytest itself shows the values of parameters.
LONG: dict[str, Callable[[], Any]] = {
    "text": lambda: "x" * 10**6,
    "text to escape": lambda: "\n" * 10**6,
    "texts": lambda: ["x" * 10**6] * 10,
    "numbers": lambda: list(range(10**6)),
    "fields": lambda: dict.fromkeys(range(10**5)),
    "names": lambda: {"x" * 10**6: {"y" * 10**6: []}},
    "a number of 20,000 digits": lambda: 10**20_000,
    "such a number in a list": lambda: [10**20_000],
    "900 lists": lambda: nested(900, wrap=lambda inner: [inner]),
    "900 objects": lambda: nested(900, wrap=lambda inner: {"a": inner}),
    "a tree of 100 million": lambda: nested(4, wrap=lambda inner: [inner] * 100),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_value_is_cut_and_marked(name: str) -> None:
    shown = quoted(LONG[name]())

    assert len(shown) <= MAX_VALUE_CHARS
    assert "..." in shown or "bits" in shown


def test_what_is_not_shown_is_not_looked_at() -> None:
    value = Counting([0] * 10**6)

    quoted(value)

    assert value.looked_at <= MAX_VALUE_CHARS


def test_a_cut_text_does_not_look_whole() -> None:
    assert quoted(["x" * 150]).startswith("['" + "x" * 100 + "...")
