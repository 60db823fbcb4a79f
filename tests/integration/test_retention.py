"""What is over goes, in small steps, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, event, func, insert, select, text
from sqlalchemy.exc import IntegrityError

from gateway import tables
from gateway.audit import record_audit
from gateway.controller import Controller
from gateway.database import DEFAULT_PROJECT, Database
from gateway.ids import new_id, now
from gateway.jobs.launch import ACTOR
from gateway.jobs.models import Job, JobKind, JobState, VerifySpec
from gateway.registry.models import VersionState
from gateway.retention import leftovers, rows
from gateway.retention.models import GcReport
from gateway.retention.service import Retention
from gateway.settings import RetentionSettings, Settings
from tests.corpus import make_bundle
from tests.jobs_world import World, a_world, add_job

OLD = timedelta(days=400)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path / "home") as found:
        yield found


def retention_of(world: World, **settings: Any) -> Retention:
    return Retention(world.database, with_retention(world.settings, **settings))


def with_retention(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update={"retention": RetentionSettings(**changes)})


async def expose(world: World, count: int, *, at: datetime, route: str = "support", step_s: float = 0.001) -> None:
    rows = [
        {
            "request_id": new_id("req-"), "project_id": DEFAULT_PROJECT, "at": at + timedelta(seconds=number * step_s),
            "route": route, "variant": "stable", "version": "support@1", "digest": "d" * 64, "unit": "u" * 64,
            "replica_id": "engine-1", "status": 200, "latency_s": 0.1,
        }
        for number in range(count)
    ]  # fmt: skip
    async with world.database.write() as connection:
        await connection.execute(insert(tables.exposures), rows)


async def add_route(world: World, name: str, weights: tuple[int, ...]) -> None:
    variants = [{"target": f"{name}@{number}", "weight": weight} for number, weight in enumerate(weights, 1)]
    row = {
        "name": name, "project_id": DEFAULT_PROJECT, "created_at": now(), "created_by": "t", "revision": 1, "salt": "s",
        "stable": "tiny", "previous": "tiny", "variants": variants, "gates": [], "updated_at": now(), "updated_by": "t",
    }  # fmt: skip
    async with world.database.write() as connection:
        await connection.execute(insert(tables.routes).values(**row))


async def count(world: World, table: Any) -> int:
    async with world.database.read() as connection:
        return int((await connection.execute(select(func.count()).select_from(table))).scalar_one())


def found(report: GcReport) -> dict[str, int]:
    return {kind.kind: kind.count for kind in report.kinds}


def age(path: Path, by: timedelta = OLD) -> None:
    moment = time.time() - by.total_seconds()
    os.utime(path, (moment, moment))


# ---- rows ----


async def test_old_exposures_go_and_young_ones_stay(world: World) -> None:
    await expose(world, 1_500, at=now() - timedelta(days=8))
    await expose(world, 10, at=now() - timedelta(days=6))
    retention = retention_of(world)

    assert found(await retention.survey()) == {"exposures": 1_500}
    assert await count(world, tables.exposures) == 1_510
    report = await retention.sweep()

    assert (found(report), report.is_complete) == ({"exposures": 1_500}, True)
    assert await count(world, tables.exposures) == 10
    assert (await retention.survey()).is_empty


async def test_more_exposures_than_allowed_lose_their_oldest(world: World) -> None:
    start = now() - timedelta(hours=1)
    await expose(world, 3_000, at=start)
    retention = retention_of(world, exposures_max_rows=1_000)

    assert found(await retention.survey()) == {"exposures": 2_000}
    await retention.sweep()

    assert await count(world, tables.exposures) == 1_000
    [oldest, *_] = sorted(row["at"] for row in await world.rows(tables.exposures))
    assert oldest == start + timedelta(seconds=2)


async def test_a_running_split_keeps_its_exposures_longer_than_others_but_not_without_end(world: World) -> None:
    await add_route(world, "split", (50, 50))
    await add_route(world, "quiet", (100, 0))
    start = now() - timedelta(hours=1)
    await expose(world, 900, at=start, route="quiet")
    await expose(world, 1_000, at=start + timedelta(minutes=1), route="split")
    retention = retention_of(world, exposures_max_rows=1_000)

    assert found(await retention.survey()) == {"exposures": 900}
    report = await retention.sweep()
    assert (found(report), report.notes) == ({"exposures": 900}, ())

    await expose(world, 1_500, at=start + timedelta(minutes=2), route="split")
    report = await retention.sweep()
    assert found(report) == {"exposures": 500}
    assert "retention.exposures_max_rows" in report.notes[0]
    assert await count(world, tables.exposures) == 2_000


async def test_events_and_attempts_of_finished_jobs_go_and_those_of_others_stay(world: World) -> None:
    for number, state in enumerate((JobState.SUCCEEDED, JobState.QUEUED)):
        job = await add_job(world, a_job(f"verify-{number}", state))
        async with world.database.write() as connection:
            await world.store.start_attempt(connection, job.id, 1, "token")
            await world.store.add_event(connection, job.id, "long ago", at=now() - OLD)
            await world.store.add_event(connection, job.id, "just now")
            await connection.execute(
                tables.job_attempts.update()
                .where(tables.job_attempts.c.job_id == job.id)
                .values(finished_at=now() - OLD)
            )

    report = await retention_of(world).sweep()

    assert found(report) == {"job_events": 1, "job_attempts": 1}
    assert await world.messages(await world.job("verify-0")) == ["just now"]
    assert await world.messages(await world.job("verify-1")) == ["long ago", "just now"]
    assert [row["job_id"] for row in await world.rows(tables.job_attempts)] == ["verify-1"]


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.SUCCEEDED])
async def test_a_job_that_says_too_much_keeps_its_newest_events(world: World, state: JobState) -> None:
    job = await add_job(world, a_job("verify-1", state))
    start = now()
    async with world.database.write() as connection:
        for number in range(250):
            await world.store.add_event(connection, job.id, f"line {number}", at=start + timedelta(microseconds=number))
    retention = retention_of(world, job_events_per_job=100)

    assert found(await retention.survey()) == {"job_events": 150}
    await retention.sweep()

    assert await world.messages(job) == [f"line {number}" for number in range(150, 250)]


async def test_of_the_audit_log_only_keys_of_evaluations_attempts_ever_go(world: World) -> None:
    entries = [
        (ACTOR, "key.create", "evaljob-1 attempt 1"), (ACTOR, "key.revoke", "evaljob-1 attempt 1"),
        ("key:evaljob-1", "key.create", "evaljob-1 attempt 1"), (ACTOR, "key.create", "somebody"),
        (ACTOR, "version.state", "evaljob-1"), ("key:boss", "route.promote", "support"),
    ]  # fmt: skip
    async with world.database.write() as connection:
        for actor, action, subject in entries:
            await record_audit(connection, project_id=DEFAULT_PROJECT, actor=actor, action=action, subject=subject)

    report = await retention_of(world, evaluation_key_audit_days=1e-9).sweep()

    assert found(report) == {"evaluation_key_audit": 2}
    left = [(row["actor"], row["action"], row["subject"]) for row in await world.rows(tables.audit)]
    assert left == entries[2:]
    for subject in {entry[2] for entry in entries[2:]}:
        with pytest.raises(IntegrityError, match="append-only"):
            async with world.database.write() as connection:
                await connection.execute(delete(tables.audit).where(tables.audit.c.subject == subject))


async def test_records_of_files_deleted_long_ago_go(world: World) -> None:
    kept, gone = await world.upload(), await world.upload()
    await world.files.delete(gone, actor="t", project_id=DEFAULT_PROJECT)

    report = await retention_of(world, deleted_files_days=1e-9).sweep()

    assert found(report) == {"deleted_files": 1}
    assert [row["id"] for row in await world.rows(tables.files)] == [kept]


async def test_whoever_moves_traffic_waits_for_one_small_step_at_most(world: World) -> None:
    """A writer gets the lock between any two steps, however much is left to remove."""
    await expose(world, 20_000, at=now() - timedelta(days=30))
    other = Database(world.database.url)
    sweeping = asyncio.create_task(retention_of(world).sweep())
    left = []
    try:
        while not sweeping.done():
            async with other.write() as connection:
                left.append((await connection.execute(select(func.count()).select_from(tables.exposures))).scalar_one())
            await asyncio.sleep(0)
    finally:
        await other.close()

    assert found(await sweeping) == {"exposures": 20_000}
    steps = [before - after for before, after in itertools.pairwise(left) if before != after]
    assert len(steps) >= 3
    assert max(steps) <= 10_000


async def test_a_locked_database_ends_the_sweep_and_the_next_goes_on(world: World) -> None:
    await expose(world, 500, at=now() - timedelta(days=30))
    blocker = Database(world.database.url)
    retention = retention_of(world)
    async with blocker.write() as connection:
        await connection.execute(text("UPDATE leases SET epoch = epoch"))
        report = await retention.sweep()
    await blocker.close()

    assert (report.is_empty, report.is_complete) == (True, False)
    assert found(await retention.sweep()) == {"exposures": 500}


async def test_a_manual_run_stops_when_its_time_is_up(world: World) -> None:
    await expose(world, 500, at=now() - timedelta(days=30))

    report = await retention_of(world).sweep(within_s=0)

    assert (report.is_complete, report.is_empty) == (False, True)


async def test_what_went_is_counted_for_the_metrics(world: World) -> None:
    await expose(world, 300, at=now() - timedelta(days=30))
    await retention_of(world).sweep()
    await expose(world, 20, at=now())

    async with world.database.read() as connection:
        assert await rows.read_deleted(connection) == {"exposures": 300}
        assert (await rows.table_rows(connection))["exposures"] == 20


async def test_every_look_and_step_ends_at_an_index(world: World) -> None:
    """A scan of a table of millions would hold up every writer."""
    from gateway.retention.due import Seen, overdue

    seen = Seen(now=now(), exposures_beyond=now(), exposed_routes=("support",), crowded_jobs=(("ftjob-1", now()),))
    sent: list[tuple[str, Any]] = []
    engine = world.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", lambda *arguments: sent.append((arguments[2], arguments[3])))
    kinds = []
    async with world.database.write() as connection:
        for due in overdue(RetentionSettings(), seen):
            await rows.remove(connection, due, rows=10)
            kinds.append(due.kind.name)
        deletes = [(statement, values) for statement, values in sent if statement.startswith("DELETE")]
        for kind, (statement, values) in zip(kinds, deletes, strict=True):
            explained = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
            plan = [str(row.detail) for row in explained]
            if kind != "deleted_files":  # as many as people uploaded and deleted by hand
                assert not any(step.startswith(f"SCAN {table_of(kind)}") for step in plan), (kind, plan)


def table_of(kind: str) -> str:
    return "audit" if kind == "evaluation_key_audit" else kind


async def test_the_controller_removes_what_is_over_by_itself(world: World) -> None:
    await expose(world, 30, at=now() - timedelta(days=30))
    controller = asyncio.create_task(Controller(world.settings).run())
    try:
        async with asyncio.timeout(30):
            while await count(world, tables.exposures):
                await asyncio.sleep(0.05)
    finally:
        controller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await controller


# ---- files ----


async def test_bytes_that_no_version_names_go_after_a_grace(world: World) -> None:
    version = await world.published()
    kept = world.registry.directory(version)
    young, old = (world.settings.artifacts_dir / digest[:2] / digest for digest in ("1" * 64, "2" * 64))
    for directory in (young, old):
        directory.mkdir(parents=True)
        (directory / "adapter_model.safetensors").write_bytes(b"x" * 1_000)
        (directory / "adapter_model.safetensors").chmod(0o444)
        directory.chmod(0o555)
    for path in (kept, old):
        age(path)
    retention = retention_of(world)

    [report] = (await retention.survey()).kinds
    assert (report.kind, report.count, report.size_bytes) == ("artifacts", 1, 1_000)
    await retention.sweep()

    assert (kept.exists(), young.exists(), old.exists()) == (True, True, False)
    world.registry.verify_files(version)


@pytest.mark.parametrize("state", [VersionState.REJECTED, VersionState.QUARANTINED])
async def test_any_version_keeps_its_bytes_whatever_became_of_it(world: World, state: VersionState) -> None:
    version = await world.published(state=state)
    age(world.registry.directory(version))
    for path in (*world.settings.manifests_dir.iterdir(), world.registry.directory(version)):
        age(path)

    assert (await retention_of(world).sweep()).is_empty
    world.registry.verify_files(version)
    world.registry.manifest(version)


async def test_a_publish_that_takes_orphaned_bytes_up_again_keeps_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the removal: the publish is not committed yet, and still its bytes stay."""
    version = await world.published()
    directory = world.registry.directory(version)
    age(directory)
    leftover = leftovers.Leftover(directory, now() - OLD, 1)
    real_rename = Path.rename

    def publish_comes_first(path: Path, target: Path) -> Path:
        if path == directory:
            os.utime(directory)  # what an install does that finds the same bytes
        return real_rename(path, target)

    monkeypatch.setattr(Path, "rename", publish_comes_first)
    assert not leftovers.remove(leftover, now() - timedelta(hours=1))
    world.registry.verify_files(version)

    monkeypatch.undo()
    age(directory)
    assert leftovers.remove(leftover, now() - timedelta(hours=1))
    again, _ = await world.registry.publish(
        "other", make_bundle(world.orders / "again", world.base, seed=7), actor="t", project_id=DEFAULT_PROJECT
    )
    world.registry.verify_files(again)


async def test_installing_bytes_that_are_there_makes_them_young(world: World) -> None:
    directory = world.registry.directory(await world.published())
    age(directory)

    await world.registry.publish(
        "other", make_bundle(world.orders / "again", world.base, seed=7), actor="t", project_id=DEFAULT_PROJECT
    )

    assert time.time() - directory.stat().st_mtime < timedelta(hours=1).total_seconds()


async def test_directories_of_finished_jobs_scores_and_backups_have_a_bound(world: World) -> None:
    done = await add_job(world, a_job("verify-done", JobState.SUCCEEDED, finished_at=now() - OLD))
    recent = await add_job(world, a_job("verify-recent", JobState.SUCCEEDED, finished_at=now()))
    waiting = await add_job(world, a_job("verify-waiting", JobState.QUEUED))
    for job in (done, recent, waiting):
        (world.attempt_dir(job)).mkdir(parents=True)
        age(world.attempt_dir(job).parent)
    score = world.settings.scores_dir / "d" / "task.json"
    score.parent.mkdir()
    score.write_text("{}")
    age(score)
    backups = [world.settings.home / f"turnout.db.000{number}.bak" for number in range(5)]
    for number, path in enumerate(backups):
        path.write_text("backup")
        age(path, timedelta(days=10 - number))

    report = await retention_of(world, backups_kept=2).sweep()

    assert found(report) == {"job_directories": 1, "scores": 1, "backups": 3}
    assert sorted(path.name for path in world.settings.jobs_dir.iterdir()) == [recent.id, waiting.id]
    assert [path for path in backups if path.exists()] == backups[3:]


async def test_what_a_killed_clean_up_had_set_aside_goes_with_the_next(world: World) -> None:
    aside = world.settings.artifacts_dir / "33" / f".gone-0000-{'3' * 64}"
    aside.mkdir(parents=True)
    age(aside)

    assert found(await retention_of(world).sweep()) == {"artifacts": 1}
    assert not aside.exists()


def a_job(job_id: str, state: JobState, *, finished_at: datetime | None = None) -> Job:
    return Job(
        id=job_id, kind=JobKind.VERIFY, state=state, spec=VerifySpec(target="support@1", digest="d" * 64),
        created_at=now(), created_by="t", project_id=DEFAULT_PROJECT, attempt=1,
        finished_at=finished_at or (now() if state.is_final else None),
    )  # fmt: skip
