"""Verdicts in the database: stored once, whoever asks how often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import tables
from gateway.database import DEFAULT_PROJECT
from gateway.ids import now
from gateway.jobs import verdicts
from gateway.jobs.models import EvaluationSpec, Job, JobKind, JobState
from gateway.jobs.verdicts import NewVerdict, StoredVerdict, Verdict, store_verdict, verdict_rows
from gateway.routing.store import create_route_for
from tests.jobs_world import PRINCIPAL, World, a_world, run_to_end

DIGEST = "a" * 64


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path / "home") as found:
        yield found


async def store(
    world: World, verdict: str, *, look: int = 1, project_id: str = DEFAULT_PROJECT, **changes: Any
) -> StoredVerdict:
    spec = EvaluationSpec(
        target="support@1", digest=DIGEST, suite="emails", suite_digest=DIGEST, stable="tiny", look=look
    )
    job = Job(
        id=f"evaljob-{verdict}", kind=JobKind.EVALUATION, state=JobState.RUNNING, spec=spec, created_at=now(),
        created_by="key:tester", project_id=project_id,
    )  # fmt: skip
    data = {"verdict": verdict, "reason": f"{verdict} because", "fingerprint": "f", "report": {}} | changes
    new = NewVerdict.from_result(spec, data, baseline="b" * 64)
    async with world.database.write() as connection:
        return await store_verdict(connection, new, job)


@pytest.mark.invariant(6)
async def test_running_a_suite_again_until_it_passes_does_not_pay(world: World) -> None:
    await store(world, "failed")

    for look in (1, 2):
        assert (await store(world, "passed", look=look)).verdict is Verdict.FAILED

    [row] = await world.rows(tables.verdicts)
    assert (row["verdict"], row["job_id"]) == ("failed", "evaljob-failed")


@pytest.mark.mutant(6)
async def test_a_verdict_that_could_be_replaced_would_be_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "supersedes", lambda *_, **__: True)

    with pytest.raises(AssertionError):
        await test_running_a_suite_again_until_it_passes_does_not_pay(world)


async def test_the_larger_look_settles_an_inconclusive_first_one_once(world: World) -> None:
    await store(world, "inconclusive")
    assert (await store(world, "passed")).verdict is Verdict.INCONCLUSIVE

    assert (await store(world, "inconclusive", look=2)).looks == 2
    assert (await store(world, "passed", look=2)).verdict is Verdict.INCONCLUSIVE

    audited = [row["after"]["verdict"] for row in await world.rows(tables.audit) if row["action"] == "verdict"]
    assert audited == ["inconclusive", "inconclusive"]


async def test_other_conditions_have_a_verdict_of_their_own(world: World) -> None:
    await store(world, "failed")

    assert (await store(world, "passed", fingerprint="g")).verdict is Verdict.PASSED
    assert len(await world.rows(tables.verdicts)) == 2


async def test_another_projects_verdict_on_the_same_weights_is_its_own(world: World) -> None:
    """Nobody is held to a verdict that they cannot see, nor told of one."""
    await store(world, "failed")

    assert (await store(world, "passed", project_id="proj_other")).verdict is Verdict.PASSED
    found = {row["project_id"]: row["verdict"] for row in await world.rows(tables.verdicts)}
    assert found == {DEFAULT_PROJECT: "failed", "proj_other": "passed"}

    [shown] = await verdict_rows(world.database, DIGEST, project_id="proj_other")
    assert shown.verdict is Verdict.PASSED


async def test_another_projects_evaluation_of_the_same_weights_answers_nobody_here(world: World) -> None:
    version = await world.published()
    suite = world.suites.find("emails")
    async with world.database.write() as connection:
        row = {
            "id": "verdict-theirs", "project_id": "proj_other", "created_at": now(), "created_by": "key:stranger",
            "digest": version.digest, "suite": suite.name, "suite_digest": suite.digest, "fingerprint": "f",
            "baseline": world.base.digest, "verdict": "passed", "reason": "theirs", "job_id": "evaljob-theirs", "looks": 1,
        }  # fmt: skip
        await connection.execute(insert(tables.verdicts).values(**row))

    job, created = await world.service.create_evaluation("support@1", "emails", principal=PRINCIPAL)

    assert created
    assert job.state is JobState.QUEUED


async def stable_is(world: World, name: str) -> None:
    """The route `support`, with this stable."""
    first = await world.registry.version("support@1")
    async with world.database.write() as connection:
        await create_route_for(connection, first)
        await connection.execute(update(tables.routes).values(stable=name))


async def test_a_version_is_held_against_the_version_that_is_stable(world: World) -> None:
    stable, version = await world.published(seed=1), await world.published(seed=2)
    await stable_is(world, stable.name)
    job, _ = await world.service.create_evaluation(version.name, "emails", principal=PRINCIPAL)

    await run_to_end(world, world.reconciler(), job)

    spec = world.seen(job)["spec"]
    assert (spec["stable"], spec["stable_digest"]) == (stable.name, stable.digest)
    assert spec["stable_adapter_dir"] == str(world.registry.directory(stable))
    [verdict] = await world.rows(tables.verdicts)
    assert (verdict["digest"], verdict["baseline"]) == (version.digest, stable.digest)


async def test_a_second_verdict_of_one_project_is_refused_by_the_database(world: World) -> None:
    await store(world, "failed")
    [row] = await world.rows(tables.verdicts)

    with pytest.raises(IntegrityError):
        async with world.database.write() as connection:
            await connection.execute(insert(tables.verdicts).values(**{**row, "id": "verdict-2", "verdict": "passed"}))


async def test_two_at_once_leave_one(world: World) -> None:
    found = await asyncio.gather(store(world, "passed"), store(world, "failed"))

    assert len({stored.verdict for stored in found}) == 1
    assert len(await world.rows(tables.verdicts)) == 1


async def test_a_verdict_that_is_not_committed_was_never_there(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(connection: AsyncConnection, name: str = "routing") -> int:
        raise OSError("power cut")

    monkeypatch.setattr(verdicts, "bump_revision", broken)
    with pytest.raises(OSError, match="power cut"):
        await store(world, "passed")

    assert await world.rows(tables.verdicts) == []
