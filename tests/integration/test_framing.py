"""The core of the framing corpus: some of every family of odd requests, straight to a running gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway import tables
from tests.fakes.stack import Stack
from tests.framing.corpus import core, corpus
from tests.framing.rows import Row, planted
from tests.framing.wire import Split, wrong_with

# Enough to come round soon, and few enough that each is answered at once.
AT_ONCE = 8
EVERY = 6
MAX_BYTES_ONE_BY_ONE = 2_000


async def wrong_rows(stack: Stack, rows: list[Row], split: Split = "whole") -> list[str]:
    """What was not as it must be, row by row."""
    port, key = int(stack.url.rpartition(":")[2]), stack.keys["admin"]
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(row: Row) -> str | None:
        async with gate:
            wrong = await wrong_with(row, port, key, split)
            return wrong and f"{row.label} ({split}): {wrong}"

    return [wrong for wrong in await asyncio.gather(*map(one, rows)) if wrong]


async def made_keys(stack: Stack) -> list[str]:
    """The keys that rows have made."""
    return [row.name for row in await stack.rows(tables.api_keys) if row.name not in stack.keys]


@pytest.mark.parametrize("split", ["whole", "lines"])
async def test_each_odd_request_gets_its_answer_and_nothing_else_is_run(tmp_path: Path, split: Split) -> None:
    async with Stack(tmp_path) as stack:
        rows = core(corpus(stack.keys["admin"], planted(stack.keys["admin"])), every=EVERY)

        wrong = await wrong_rows(stack, rows, split)

        assert wrong == []
        assert len(rows) > 150
        made = await made_keys(stack)
        assert [name for name in made if not name.startswith("own-")] == []
        assert len(made) == sum(row.made for row in rows)


async def test_byte_by_byte_it_is_the_same(tmp_path: Path) -> None:
    async with Stack(tmp_path) as stack:
        every_row = corpus(stack.keys["admin"], planted(stack.keys["admin"]))
        rows = [row for row in core(every_row, every=12) if len(row.sent) <= MAX_BYTES_ONE_BY_ONE]

        wrong = await wrong_rows(stack, rows, "bytes")

        assert wrong == []
        assert [name for name in await made_keys(stack) if not name.startswith("own-")] == []


async def test_a_server_that_framed_loosely_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.connections.heads._SINGLE", frozenset())
    async with Stack(tmp_path) as stack:
        key = stack.keys["admin"]
        rows = [row for row in corpus(key, planted(key)) if row.family == "twice"]

        wrong = await wrong_rows(stack, rows)

        assert len(wrong) > 3
