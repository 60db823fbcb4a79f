"""Whatever a job leaves behind, the job ends: on databases that enforce lengths and refuse NUL too."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway import tables
from gateway.jobs import output
from gateway.jobs import reconciler as reconciler_module
from gateway.jobs.guard import MAX_BAFFLED
from gateway.jobs.launch import Launcher
from gateway.jobs.models import Job, JobKind, JobState
from gateway.registry.models import VersionState
from tests.jobs_world import FINISH, PRINCIPAL, World, a_world, run_to_end, tick_until
from tests.strict_database import enforce_columns

# What makes a text odd in itself is the matter of tests/unit/test_fitting.py; here it is whether the job ends.
ODD_TEXTS = {"a code of 61 characters": "c" * 61, "a NUL": "bad\x00code", "half of a pair": "\ud800", "spaces": "   "}
ODD_REASONS = {"41 characters": "c" * 41, "a million characters": "c" * 1_000_000, "an escape": "\x1b[31mred"}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path / "home", max_attempts=2) as found:
        await enforce_columns(found.database)
        yield found


@pytest.mark.parametrize("said", ODD_TEXTS.values(), ids=ODD_TEXTS)
async def test_a_job_ends_whatever_code_and_message_it_leaves(world: World, said: str) -> None:
    job = await world.fine_tuning()
    ended = await ended_with(world, job, JobKind.FINE_TUNING, {"ok": False, "error_code": said, "error_message": said})

    assert ended.state is JobState.FAILED
    assert ended.error_code
    assert ended.error_code.isprintable()
    assert len(ended.error_code) <= 60
    assert ended.error_message


@pytest.mark.parametrize("said", ODD_REASONS.values(), ids=ODD_REASONS)
async def test_a_version_is_rejected_whatever_its_verification_says(world: World, said: str) -> None:
    world.order(JobKind.VERIFY, {"do": "hang"})
    await world.published(state=VersionState.RECEIVED)
    await world.reconciler().tick()
    [row] = await world.rows(tables.jobs)

    ended = await ended_with(
        world, await world.job(row["id"]), JobKind.VERIFY, {"ok": False, "error_code": said, "error_message": said}
    )

    assert ended.state is JobState.FAILED
    [version] = await world.rows(tables.adapter_versions)
    assert version["state"] == VersionState.REJECTED
    assert 0 < len(version["state_code"]) <= 40


ODD_DATA: dict[str, str] = {
    "numbers that JSON has not": '{"verdict": "passed", "reason": "r", "fingerprint": "f", "report": {"a": NaN, "b": -Infinity}}',
    "a number of 5000 digits": '{"verdict": "passed", "reason": "r", "fingerprint": "f", "report": {"n": '
    + "9" * 5000
    + "}}",
    "a deep report": '{"verdict": "passed", "reason": "r", "fingerprint": "f", "report": {"d": '
    + "[" * 150
    + "]" * 150
    + "}}",
    "a report too deep for a reader": '{"report": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "a NUL in the reason": '{"verdict": "passed", "reason": "a\\u0000b", "fingerprint": "f", "report": {"k\\u0000": "v\\u0000"}}',
    "half of a pair in the report": '{"verdict": "passed", "reason": "r", "fingerprint": "f", "report": {"k": "\\ud800"}}',
    "a NUL in the fingerprint": '{"verdict": "passed", "reason": "r", "fingerprint": "f\\u0000", "report": {}}',
    "a long fingerprint": '{"verdict": "passed", "reason": "r", "fingerprint": "' + "f" * 65 + '", "report": {}}',
    "a long reason": '{"verdict": "passed", "reason": "' + "r" * 1_000_000 + '", "fingerprint": "f", "report": {}}',
    "a verdict of its own": '{"verdict": "splendid", "reason": "r", "fingerprint": "f", "report": {}}',
    "no report": '{"verdict": "passed", "reason": "r", "fingerprint": "f"}',
    "names of ours": '{"verdict": "passed", "reason": "r", "fingerprint": "f", "report": {}, "error_code": "x", "state": "y"}',
}


@pytest.mark.parametrize("data", ODD_DATA.values(), ids=ODD_DATA)
async def test_an_evaluation_ends_whatever_its_result_holds(world: World, data: str) -> None:
    version = await world.published()
    job, _ = await world.service.create_evaluation(version.name, "emails", principal=PRINCIPAL)

    ended = await ended_with(world, job, JobKind.EVALUATION, {"ok": True}, raw_data=data)

    assert ended.state.is_final
    assert ended.state is JobState.SUCCEEDED or ended.error_code in ("bad_verdict", "crashed")
    json.dumps(ended.model_dump(mode="json"), allow_nan=False).encode()


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("progress.jsonl", "directory"), ("progress.jsonl", "pipe"), ("result.json", "directory"), ("result.json", "pipe"),
        ("log.txt", "directory"), ("log.txt", "pipe"), ("reference.json", "pipe"), ("progress.jsonl", "link to a device"),
    ],
)  # fmt: skip
async def test_a_job_ends_whatever_lies_where_a_file_belongs(world: World, name: str, made: str) -> None:
    """A pipe that is opened waits for a writer for ever, a directory cannot be read."""
    world.order(JobKind.VERIFY, {"do": "litter", "name": name, "made": made})
    await world.published(state=VersionState.RECEIVED)
    reconciler = world.reconciler()
    await reconciler.tick()
    [row] = await world.rows(tables.jobs)

    ended = await run_to_end(world, reconciler, await world.job(row["id"]))

    assert ended.error_code in ("crashed", None)


async def test_lines_of_any_time_level_and_size_are_kept_in_order(world: World) -> None:
    odd = [
        '{"at": "9999-12-31T23:59:59.999999Z", "message": "late"}',
        '{"at": "9999-12-31T23:59:59-14:00", "message": "later"}',
        '{"at": "0001-01-01T00:00:00+14:00", "message": "early"}',
        '{"at": "2026-01-01T00:00:00Z", "message": "nul \\u0000"}',
        '{"at": "2026-01-01T00:00:00Z", "message": "' + "m" * 50_000 + '"}',
        '{"at": "2026-01-01T00:00:00Z", "message": "m", "level": "' + "l" * 50 + '"}',
        '{"at": "2026-01-01T00:00:00Z", "message": "big", "type": "metrics", "data": {"n": 1e999, "i": '
        + "9" * 400
        + "}}",
        '{"at": "2026-01-01T00:00:00Z", "message": "deep", "data": {"d": ' + "[" * 120 + "]" * 120 + "}}",
        '{"at": 1e300, "message": "no time"}',
    ]
    world.order(JobKind.FINE_TUNING, FINISH | {"progress": "\n".join(odd) + "\n"})

    ended = await run_to_end(world, world.reconciler(), await world.fine_tuning(), timeout_s=60)

    assert ended.state in (JobState.SUCCEEDED, JobState.FAILED)
    rows = await world.rows(tables.job_events)
    assert any("␀" in row["message"] for row in rows)
    assert max(len(row["message"]) for row in rows) <= 4_000


async def test_a_job_that_baffles_the_controller_fails_and_holds_up_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody foresaw: the job is given up by name, and the others go on."""
    real = output.read_result
    odd = await world.fine_tuning(suffix="odd")
    good = await world.fine_tuning(suffix="good")

    def baffled(directory: Path) -> Any:
        if directory.parent.name == odd.id:
            raise RecursionError("nobody foresaw this")
        return real(directory)

    monkeypatch.setattr(reconciler_module, "read_result", baffled)
    reconciler = world.reconciler()

    ended = await run_to_end(world, reconciler, odd)

    assert (ended.state, ended.error_code) == (JobState.FAILED, "internal_error")
    assert f"{MAX_BAFFLED} times" in (ended.error_message or "")

    async def is_published() -> bool:
        return (await world.job(good)).state in (JobState.PUBLISHING, JobState.SUCCEEDED)

    await tick_until(reconciler, is_published, what="the start of the other job")


async def ended_with(
    world: World, job: Job, kind: JobKind, result: dict[str, Any], *, raw_data: str | None = None
) -> Job:
    """Let a job leave exactly this result."""
    filled = json.dumps(result)[1:-1] + (f', "data": {raw_data}' if raw_data is not None else "")
    world.order(kind, {"do": "leave", "text": filled})
    (world.orders / "release").touch()
    return await run_to_end(world, world.reconciler(), job)


async def test_a_job_that_cannot_be_started_keeps_no_other_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Launcher.launch
    odd = await world.fine_tuning(suffix="odd")
    good = await world.fine_tuning(suffix="good")

    async def baffled(self: Launcher, job: Job, token: str) -> None:
        if job.id == odd.id:
            raise ValueError("nobody foresaw this")
        await real(self, job, token)

    monkeypatch.setattr(Launcher, "launch", baffled)
    reconciler = world.reconciler()

    assert (await run_to_end(world, reconciler, odd)).state is JobState.FAILED

    async def is_published() -> bool:
        return (await world.job(good)).state in (JobState.PUBLISHING, JobState.SUCCEEDED)

    await tick_until(reconciler, is_published, what="the start of the other job")
