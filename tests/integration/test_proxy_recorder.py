"""The recorder: in order, once, and never stuck on one bad batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from gateway import tables
from gateway.errors import Unavailable
from gateway.ids import now
from gateway.metrics import Metrics
from gateway.proxy.recorder import Exposure, Recorder
from tests.fakes.stack import Stack


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    made = Stack(tmp_path)
    await made.prepare()
    yield made
    await made.__aexit__(None, None, None)


def an_exposure(number: int) -> Exposure:
    return Exposure(
        request_id=f"req-{number}", project_id="p", at=now(), route="r", variant="v", version="v", digest="d" * 64,
        unit="u" * 64, replica_id="replica-1", status=200, finish_reason="stop", latency_s=0.1, first_token_s=None,
        prompt_tokens=1, completion_tokens=2,
    )  # fmt: skip


async def test_more_than_a_batch_is_stored_whole(stack: Stack) -> None:
    recorder = Recorder(stack.database, Metrics())
    for number in range(2_500):
        recorder.record(an_exposure(number))

    await recorder.flush()

    assert len(await stack.rows(tables.exposures)) == 2_500
    assert recorder.queued == 0


async def test_a_batch_that_cannot_be_stored_does_not_hold_up_the_next(stack: Stack) -> None:
    metrics = Metrics()
    recorder = Recorder(stack.database, metrics)
    recorder.record(an_exposure(1))
    await recorder.flush()
    recorder.record(an_exposure(1))
    await recorder.flush()
    recorder.record(an_exposure(2))

    await recorder.flush()

    assert {row.request_id for row in await stack.rows(tables.exposures)} == {"req-1", "req-2"}
    assert metrics.registry.get_sample_value("turnout_exposures_dropped_total") == 1
    assert metrics.registry.get_sample_value("turnout_exposures_written_total") == 2


async def test_what_cannot_be_stored_now_is_kept(stack: Stack) -> None:
    recorder = Recorder(stack.database, Metrics())
    recorder.record(an_exposure(1))
    file = stack.settings.home / "turnout.db"
    await stack.rows(tables.exposures)
    file.rename(file.with_suffix(".gone"))

    with pytest.raises(Unavailable):
        await recorder.flush()

    assert recorder.queued == 1
    file.with_suffix(".gone").rename(file)
    await recorder.flush()
    assert len(await stack.rows(tables.exposures)) == 1


async def test_stopping_ends_with_a_flush(stack: Stack) -> None:
    recorder = Recorder(stack.database, Metrics())
    running = asyncio.create_task(recorder.run())
    recorder.record(an_exposure(1))

    recorder.stop()
    await asyncio.wait_for(running, 5)

    assert len(await stack.rows(tables.exposures)) == 1
