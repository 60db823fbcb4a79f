"""Text that others supplied, made to fit the column it is written to: every database and terminal takes what comes out.

A job's words are the main source. A code of 61 characters, a NUL or half of a surrogate pair is refused by one database,
kept by another and breaks a third when it is read; and what cannot be written can never end. So nothing of a job's is
written as it came: the bound is the column's own, of `tables.py`, so that a new column is covered by being declared.
What was replaced or cut is visible as such.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from sqlalchemy import JSON, Column, String, Table, Text

CUT = "… [cut]"
SHORT_CUT = "…"
MAX_TEXT = 16_000
MAX_JSON_CHARACTERS = 8 * 2**20
MAX_JSON_ITEMS = 200_000
MAX_JSON_DEPTH = 48  # readers of JSON give up at a hundred or two
MAX_JSON_INTEGER = 2**63 - 1  # the largest that every writer and reader of JSON here knows
_MAX_KEY = 200
_ROOM_FOR_WORDS = 80  # in a shorter column stands a name or a code
_KEPT_CONTROLS = frozenset("\n\t")
_REPLACED = "\N{REPLACEMENT CHARACTER}"
_C0_PICTURES = 0x2400
_DELETE, _DELETE_PICTURE = 0x7F, "\N{SYMBOL FOR DELETE}"
# Control, format (they turn text around or hide it), surrogate, private and unassigned; none of them has a shape of its own.
_UNSHOWN = frozenset({"Cc", "Cs", "Cn"})
_TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff")


def fit(table: Table, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, texts and JSON cleaned and cut to what their columns hold; what no column bounds is left alone."""
    return {name: fit_column(table.c[name], value) if name in table.c else value for name, value in values.items()}


def fit_column(column: Column[Any], value: Any) -> Any:
    """One value as its column takes it."""
    if isinstance(column.type, JSON):
        return clean_json(value, most=column.info.get("most", MAX_JSON_CHARACTERS))
    if isinstance(value, str) and isinstance(column.type, String):
        return clean_text(value, longest(column))
    return value


def longest(column: Column[Any]) -> int:
    """How many characters a text column takes."""
    declared = column.type.length if isinstance(column.type, String) and not isinstance(column.type, Text) else None
    return int(declared or column.info.get("most", MAX_TEXT))


def clean_text(text: str, most: int) -> str:
    """At most `most` characters, every one of them with a shape; a text that was cut ends with a mark."""
    shown = text if text.isascii() and text.isprintable() else "".join(map(_shown, text[: most + 1]))
    if len(text) <= most and len(shown) <= most:
        return str(shown)
    mark = CUT if most >= _ROOM_FOR_WORDS else SHORT_CUT
    return shown[: most - len(mark)] + mark


def clean_json(value: Any, *, most: int = MAX_JSON_CHARACTERS) -> Any:
    """The same JSON with clean texts, numbers that JSON has, and a bound on depth, items and characters."""
    return _Cleaner(most).clean(value, 0)


class _Cleaner:
    """One walk over a value; what comes after its budget is spent is left out and said to be."""

    def __init__(self, most: int) -> None:
        self._characters = most
        self._items = MAX_JSON_ITEMS

    def clean(self, value: Any, depth: int) -> Any:
        self._items -= 1
        match value:
            case None | bool():
                return value
            case int():
                return self._number(int(value))
            case float():
                return value if math.isfinite(value) else None
            case str():
                return self._text(str(value), self._characters)
            case dict() | list() | tuple() if depth >= MAX_JSON_DEPTH:
                return CUT
            case dict():
                return self._object(value, depth)
            case list() | tuple():
                return self._array(value, depth)
            case _:
                return self._text(str(value), _MAX_KEY)

    def _number(self, value: int) -> int | str:
        """A longer one is told by its length: the digits of a huge one take seconds, and few readers take it."""
        if -MAX_JSON_INTEGER <= value <= MAX_JSON_INTEGER:
            return value
        return f"an integer of {value.bit_length()} bits"

    def _text(self, text: str, most: int) -> str:
        cleaned = clean_text(text, max(len(CUT), min(most, self._characters)))
        self._characters -= len(cleaned)
        return cleaned

    def _object(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, inner in value.items():
            if self._is_spent:
                made[CUT] = len(value) - len(made)
                break
            made[self._text(str(key), _MAX_KEY)] = self.clean(inner, depth + 1)
        return made

    def _array(self, value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
        made: list[Any] = []
        for inner in value:
            if self._is_spent:
                made.append(CUT)
                break
            made.append(self.clean(inner, depth + 1))
        return made

    @property
    def _is_spent(self) -> bool:
        return self._characters <= 0 or self._items <= 0


def _shown(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return character if character in _KEPT_CONTROLS else chr(_C0_PICTURES + code)
    if code == _DELETE:
        return _DELETE_PICTURE
    if character in _TURNING or unicodedata.category(character) in _UNSHOWN:
        return _REPLACED
    return character
