"""Whatever text or JSON somebody supplies: what is written fits its column, and every database and reader takes it."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import JSON, Column, Integer, MetaData, String, Table, Text

from gateway import tables
from gateway.fitting import CUT, MAX_JSON_DEPTH, MAX_TEXT, SHORT_CUT, clean_json, clean_text, fit, longest

ANY_TEXT = st.text(st.characters(), max_size=200) | st.text("\x00\x1b\u202e\ud800\udfff\x7f\x85a", max_size=100)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(ANY_TEXT, inner, max_size=5),
    max_leaves=40,
)
SOURCED = [
    column
    for table in tables.metadata.tables.values()
    for column in table.columns
    if isinstance(column.type, String | JSON)
]


@given(ANY_TEXT, st.integers(min_value=8, max_value=100))
@settings(deadline=None)
def test_any_text_fits_and_can_be_written_and_shown(text: str, most: int) -> None:
    cleaned = clean_text(text, most)

    assert len(cleaned) <= most
    assert clean_text(cleaned, most) == cleaned
    cleaned.encode()
    assert all(unicodedata.category(shown) not in ("Cc", "Cs", "Cn") or shown in "\n\t" for shown in cleaned)
    assert "\x00" not in cleaned


@given(ANY_JSON)
@settings(deadline=None)
def test_any_json_can_be_written_and_read_by_everyone(value: Any) -> None:
    cleaned = clean_json(value)

    written = json.dumps(cleaned, allow_nan=False)
    assert json.loads(written) == cleaned
    assert orjson.loads(orjson.dumps(cleaned)) == cleaned
    assert "\\u0000" not in written
    assert clean_json(cleaned) == cleaned


@pytest.mark.parametrize("column", SOURCED, ids=lambda column: f"{column.table.name}.{column.name}")
def test_every_column_has_a_bound(column: Column[Any]) -> None:
    hostile = "\x00" * 100_000 if isinstance(column.type, String) else {"k\x00": ["\x00" * 100_000]}

    written = fit(column.table, {column.name: hostile})[column.name]

    assert "\x00" not in json.dumps(written)
    if isinstance(column.type, String):
        assert len(written) == longest(column)


def test_a_column_of_tomorrow_is_bounded_by_its_declaration() -> None:
    table = Table("t", MetaData(), Column("a", String(7)), Column("b", Text), Column("c", JSON), Column("n", Integer))

    found = fit(table, {"a": "x" * 99, "b": "y" * 99_999, "c": {"d": math.nan}, "n": 3, "unknown": "\x00"})

    assert found == {
        "a": "x" * 6 + SHORT_CUT, "b": found["b"], "c": {"d": None}, "n": 3, "unknown": "\x00",
    }  # fmt: skip
    assert len(found["b"]) == MAX_TEXT
    assert found["b"].endswith(CUT)


def test_what_was_replaced_or_cut_is_seen() -> None:
    assert clean_text("a\x00b\x1b[31m\x7f\u202ec", 60) == "a␀b␛[31m␡\ufffdc"
    assert clean_text("one\ntwo\tthree", 60) == "one\ntwo\tthree"
    assert clean_text("Grüße, 你好 🙂", 60) == "Grüße, 你好 🙂"
    assert clean_text("x" * 61, 60) == "x" * 59 + SHORT_CUT
    assert clean_text("x" * 200, 100) == "x" * 93 + CUT


def test_depth_items_characters_and_digits_of_json_have_bounds() -> None:
    deep: Any = "bottom"
    for _ in range(10_000):
        deep = [deep]
    cleaned, levels = clean_json(deep), 0
    while isinstance(cleaned, list):
        cleaned, levels = cleaned[0], levels + 1
    assert (levels, cleaned) == (MAX_JSON_DEPTH, CUT)

    assert clean_json({"n": 10**5_000}) == {"n": "an integer of 16610 bits"}
    assert clean_json({"n": 2**63 - 1}) == {"n": 2**63 - 1}
    assert len(json.dumps(clean_json(["word"] * 10_000, most=1_000))) < 10_000
    assert CUT in clean_json({str(n): "word" for n in range(10_000)}, most=1_000)
