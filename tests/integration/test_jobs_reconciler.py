"""Jobs from beginning to end: a real database, real processes, programs that stand in for torch."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import insert

from gateway import tables
from gateway.errors import Conflict
from gateway.jobs import reconciler as reconciler_module
from gateway.jobs.launch import MAX_ATTEMPT_S, environment
from gateway.jobs.models import Job, JobKind, JobResult, JobState
from gateway.jobs.suites import suite_digest
from gateway.processes import look_at
from gateway.registry.artifacts import Artifacts
from gateway.registry.models import VersionState
from tests.corpus import make_bundle
from tests.jobs_world import FINISH, PRINCIPAL, World, a_world, chat_rows, run_to_end, tick_until


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path / "home") as found:
        yield found


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[World]:
    """A world whose versions must be loaded before they count."""
    async with a_world(tmp_path / "home", engine=True) as found:
        await found.add_replica()
        yield found


def is_alive(pid: int) -> bool:
    seen = look_at(pid)
    return seen is not None and not seen.is_zombie


async def until_started(world: World, job: Job, attempt: int = 1) -> None:
    async def started() -> bool:
        return world.has_started(job, attempt)

    await tick_until(world.reconciler(), started, what="the start")


# ---- fine-tuning ----


async def test_a_fine_tuning_job_trains_publishes_verifies_and_succeeds(world: World) -> None:
    job = await world.fine_tuning(validation_file=await world.upload(chat_rows(5, start=100)), seed=5)

    ended = await run_to_end(world, world.reconciler(), job)

    assert ended.state is JobState.SUCCEEDED
    assert ended.result is not None
    assert ended.result["fine_tuned_model"] == "support@1"
    assert ended.result["trained_tokens"] == 1234
    assert ended.result["metrics"] == {"loss": 0.25, "worst": None}
    version = await world.registry.version("support@1")
    assert (version.state, version.job_id, version.created_by) == (VersionState.VERIFIED, job.id, "key:tester")
    assert (
        json.loads((world.settings.references_dir / f"{version.digest}.json").read_text())["digest"] == version.digest
    )
    messages = await world.messages(job)
    assert messages[0] == f"Created fine-tuning job: {job.id}"
    assert messages[1:] == [
        "validation file, file: only 5 rows; a fine-tune wants at least 10, and hundreds to be any good [few_rows]",
        "Files validated, moving job to queued state",
        "The job has started (attempt 1).",
        "step",
        "Published support@1; verifying and loading it",
        "The job has successfully completed",
    ]


async def test_the_trainer_gets_a_whole_config(world: World) -> None:
    job = await world.fine_tuning(seed=5, hyperparameters={"n_epochs": 3, "learning_rate_multiplier": 2.0, "rank": 4})

    await run_to_end(world, world.reconciler(), job)

    spec = world.seen(job)["spec"]
    assert set(spec) == {"token", "config"}
    assert spec["config"] == {
        "rank": 4,
        "epochs": 3,
        "learning_rate": 2e-3,
        "recipe": "sft",
        "adapter": "support",
        "base_model": str(world.base.path),
        "base_model_name": "tiny",
        "init_from": None,
        "parent": None,
        "dataset": str(world.settings.files_dir / job.spec.training_file),  # type: ignore[union-attr]
        "validation": None,
        "threads": 1,
        "seed": 5,
    }


async def test_training_on_from_a_version_names_its_parent(world: World) -> None:
    parent = await world.published()
    job = await world.fine_tuning(model="support@1")

    ended = await run_to_end(world, world.reconciler(), job)

    assert ended.result is not None
    assert ended.result["fine_tuned_model"] == "support@2"
    assert world.seen(job)["spec"]["config"]["init_from"] == str(world.registry.directory(parent))
    assert (await world.registry.version("support@2")).parent == "support@1"


async def test_a_bad_file_fails_the_job_with_the_line(world: World) -> None:
    job = await world.fine_tuning(training_file=await world.upload([*chat_rows(12), {"messages": []}]))

    ended = await run_to_end(world, world.reconciler(), job)

    assert (ended.state, ended.error_code) == (JobState.FAILED, "invalid_training_file")
    assert "line 13: `messages` is empty [empty_messages]" in (ended.error_message or "")
    assert not world.has_started(job)


async def test_a_validation_file_made_of_training_rows_fails_the_job(world: World) -> None:
    job = await world.fine_tuning(validation_file=await world.upload(chat_rows(10)))

    ended = await run_to_end(world, world.reconciler(), job)

    assert (ended.state, ended.error_code) == (JobState.FAILED, "invalid_validation_file")


async def test_a_file_whose_bytes_changed_is_not_trained_on(world: World) -> None:
    job = await world.fine_tuning()
    path = world.settings.files_dir / job.spec.training_file  # type: ignore[union-attr]
    path.chmod(0o600)
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(21)))

    ended = await run_to_end(world, world.reconciler(), job)

    assert (ended.state, ended.error_code) == (JobState.FAILED, "file_damaged")


async def test_a_refused_bundle_fails_the_job_with_its_reason_code(world: World) -> None:
    broken = world.orders / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    world.order(JobKind.FINE_TUNING, FINISH | {"bundle": str(broken)})

    ended = await run_to_end(world, world.reconciler(), await world.fine_tuning())

    assert ended.state is JobState.FAILED
    assert ended.error_code not in (None, "crashed")
    assert await world.registry.versions() == []


async def test_the_same_training_twice_gives_the_same_version(world: World) -> None:
    first = await run_to_end(world, world.reconciler(), await world.fine_tuning())
    manifest = json.loads((world.bundle / "manifest.json").read_text())
    (world.bundle / "manifest.json").write_text(json.dumps(manifest | {"wall_s": 99.0}))

    second = await run_to_end(world, world.reconciler(), await world.fine_tuning())

    assert first.result is not None
    assert second.result is not None
    assert first.result["fine_tuned_model"] == second.result["fine_tuned_model"] == "support@1"
    assert second.state is JobState.SUCCEEDED


async def test_a_finished_job_keeps_its_log_and_gives_its_disk_back(world: World) -> None:
    job = await world.fine_tuning()

    await run_to_end(world, world.reconciler(), job)

    assert sorted(path.name for path in world.attempt_dir(job).iterdir()) == [
        "log.txt",
        "progress.jsonl",
        "result.json",
    ]
    assert [path.name for path in world.attempt_dir(job).parent.iterdir()] == ["1"]


# ---- verified, loaded, probed ----


async def test_a_job_succeeds_only_when_its_version_is_loaded_everywhere(served: World) -> None:
    await served.add_replica(replica_id="engine-2")
    reconciler = served.reconciler()
    job = await served.fine_tuning()

    async def verified() -> bool:
        return any(version.state is VersionState.VERIFIED for version in await served.registry.versions())

    await tick_until(reconciler, verified)
    version = await served.registry.version("support@1")
    await served.set_residency(version, "ready")
    await served.set_residency(version, "probing", replica_id="engine-2")
    for _ in range(3):
        await reconciler.tick()
    assert (await served.job(job)).state is JobState.PUBLISHING

    await served.set_residency(version, "ready", replica_id="engine-2")
    assert (await run_to_end(served, reconciler, job)).state is JobState.SUCCEEDED


async def test_a_version_that_the_probe_quarantines_fails_its_job_with_the_cause(served: World) -> None:
    reconciler = served.reconciler()
    job = await served.fine_tuning()

    async def verified() -> bool:
        return any(version.state is VersionState.VERIFIED for version in await served.registry.versions())

    await tick_until(reconciler, verified)
    version = await served.registry.version("support@1")
    await served.registry.set_state(
        version.id, VersionState.QUARANTINED, code="parity", reason="off by 2 nats", actor="t"
    )

    ended = await run_to_end(served, reconciler, job)
    assert (ended.state, ended.error_code) == (JobState.FAILED, "parity")
    assert "off by 2 nats" in (ended.error_message or "")


# ---- crashes and retries ----


async def test_a_crashed_attempt_is_tried_again(world: World) -> None:
    world.order(JobKind.FINE_TUNING, {"do": "crash"}, FINISH)
    job = await world.fine_tuning()

    ended = await run_to_end(world, world.reconciler(), job)

    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 2)
    attempts = [
        (row["attempt"], row["outcome"]) for row in await world.rows(tables.job_attempts) if row["job_id"] == job.id
    ]
    assert attempts == [(1, "crashed"), (2, "succeeded")]
    tokens = {row["token_hash"] for row in await world.rows(tables.job_attempts)}
    assert len(tokens) == len(await world.rows(tables.job_attempts))
    assert any("exit code 3" in message and "CUDA is a mystery" in message for message in await world.messages(job))


async def test_a_job_that_always_crashes_fails_with_the_end_of_its_log(world: World) -> None:
    world.order(JobKind.FINE_TUNING, {"do": "crash"})

    ended = await run_to_end(world, world.reconciler(), await world.fine_tuning())

    assert (ended.state, ended.error_code, ended.attempt) == (JobState.FAILED, "crashed", 3)
    assert ended.error_message == "attempt 3 ended with exit code 3 and without a result: Traceback: CUDA is a mystery"


async def test_ending_well_without_a_result_is_a_crash(world: World) -> None:
    world.order(JobKind.FINE_TUNING, {"do": "quit"}, FINISH)

    ended = await run_to_end(world, world.reconciler(), await world.fine_tuning())

    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 2)


async def test_a_refusal_by_the_trainer_is_final(world: World) -> None:
    world.order(JobKind.FINE_TUNING, {"do": "fail", "code": "diverged", "message": "the loss is no number"})

    ended = await run_to_end(world, world.reconciler(), await world.fine_tuning())

    assert (ended.state, ended.error_code, ended.error_message, ended.attempt) == (
        JobState.FAILED,
        "diverged",
        "the loss is no number",
        1,
    )


async def test_a_silent_attempt_is_killed_and_tried_again(tmp_path: Path) -> None:
    async with a_world(tmp_path / "home", heartbeat_timeout_s=1.0) as world:
        world.order(JobKind.FINE_TUNING, {"do": "mute"}, FINISH)
        job = await world.fine_tuning()

        ended = await run_to_end(world, world.reconciler(), job)

        assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 2)
        assert not is_alive(world.seen(job, 1)["pid"])
        assert any("said nothing for" in message for message in await world.messages(job))


@pytest.mark.invariant(10)
async def test_only_the_current_attempt_may_report(world: World) -> None:
    world.order(JobKind.FINE_TUNING, {"do": "crash"}, {"do": "hang"})
    job = await world.fine_tuning()
    reconciler = world.reconciler()

    async def second_attempt_runs() -> bool:
        return world.has_started(job, 2)

    await tick_until(reconciler, second_attempt_runs)
    late = JobResult(
        token=world.seen(job, 1)["spec"]["token"], ok=False, error_code="late", error_message="from the grave"
    )
    for attempt in (1, 2):
        (world.attempt_dir(job, attempt) / "result.json").write_text(late.model_dump_json())
    for _ in range(5):
        await reconciler.tick()
    assert (await world.job(job)).state is JobState.RUNNING

    (world.orders / "release").touch()
    ended = await run_to_end(world, reconciler, job)
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 2)


@pytest.mark.mutant(10)
async def test_without_the_token_check_a_late_attempt_would_decide(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.jobs.reconciler.hmac.compare_digest", lambda left, right: True)

    with pytest.raises(AssertionError):
        await test_only_the_current_attempt_may_report(world)


async def test_a_result_that_is_no_json_is_a_crash_once_the_process_ended(world: World) -> None:
    world.order(JobKind.FINE_TUNING, {"do": "hang"}, FINISH)
    job = await world.fine_tuning()
    reconciler = world.reconciler()

    async def started() -> bool:
        return world.has_started(job)

    await tick_until(reconciler, started)
    (world.attempt_dir(job) / "result.json").write_text("nonsense")
    await reconciler.tick()
    assert (await world.job(job)).state is JobState.RUNNING

    os.kill(world.seen(job)["pid"], 9)
    ended = await run_to_end(world, reconciler, job)
    assert (ended.state, ended.attempt) == (JobState.SUCCEEDED, 2)


# ---- cancel ----


async def test_cancelling_a_running_job_ends_its_process(world: World) -> None:
    world.order(JobKind.FINE_TUNING, {"do": "hang"})
    job = await world.fine_tuning()
    await until_started(world, job)

    asked = await world.service.cancel(job.id, principal=PRINCIPAL)
    again = await world.service.cancel(job.id, principal=PRINCIPAL)
    ended = await run_to_end(world, world.reconciler(), job)

    assert asked.cancel_requested
    assert again == asked
    assert ended.state is JobState.CANCELLED
    assert not is_alive(world.seen(job)["pid"])
    assert await world.rows(tables.processes) == []
    assert (await world.service.cancel(job.id, principal=PRINCIPAL)).state is JobState.CANCELLED


async def test_cancelling_a_job_that_has_not_begun_needs_no_controller(world: World) -> None:
    job = await world.fine_tuning()

    cancelled = await world.service.cancel(job.id, principal=PRINCIPAL)
    await world.reconciler().tick()

    assert cancelled.state is JobState.CANCELLED
    assert not world.has_started(job)


async def test_a_job_that_is_over_cannot_be_cancelled(world: World) -> None:
    job = await run_to_end(world, world.reconciler(), await world.fine_tuning())

    with pytest.raises(Conflict) as refused:
        await world.service.cancel(job.id, principal=PRINCIPAL)
    assert refused.value.code == "job_final"


async def test_a_verification_cannot_be_cancelled(world: World) -> None:
    await world.published(state=VersionState.RECEIVED)
    world.order(JobKind.VERIFY, {"do": "hang"})
    await world.reconciler().tick()
    [job] = await world.store.list(kinds={JobKind.VERIFY})

    with pytest.raises(Conflict) as refused:
        await world.service.cancel(job.id, principal=PRINCIPAL)
    assert refused.value.code == "not_cancellable"


# ---- verification ----


async def test_a_version_that_fails_verification_is_rejected_for_good(world: World) -> None:
    version = await world.published(state=VersionState.RECEIVED)
    world.order(JobKind.VERIFY, {"do": "fail", "code": "no_effect", "message": "answers as the base model does"})
    reconciler = world.reconciler()

    async def judged() -> bool:
        return (await world.registry.version(version.name)).state is not VersionState.RECEIVED

    await tick_until(reconciler, judged)
    await reconciler.tick()

    found = await world.registry.version(version.name)
    assert (found.state, found.state_code, found.state_reason) == (
        VersionState.REJECTED,
        "no_effect",
        "answers as the base model does",
    )
    assert len(await world.store.list(kinds={JobKind.VERIFY})) == 1
    assert not list(world.settings.references_dir.iterdir())


async def test_a_fine_tuning_job_fails_with_the_cause_of_the_rejection(world: World) -> None:
    world.order(JobKind.VERIFY, {"do": "fail", "code": "log_loss", "message": "24.6 nats on plain text"})

    ended = await run_to_end(world, world.reconciler(), await world.fine_tuning())

    assert (ended.state, ended.error_code) == (JobState.FAILED, "log_loss")
    assert "24.6 nats" in (ended.error_message or "")


async def test_a_verification_that_keeps_crashing_is_given_up_until_a_restart(world: World) -> None:
    world.order(JobKind.VERIFY, {"do": "crash"})
    job = await world.fine_tuning()

    ended = await run_to_end(world, world.reconciler(), job)

    assert (ended.state, ended.error_code) == (JobState.FAILED, "verify_crashed")
    version = await world.registry.version("support@1")
    assert version.state is VersionState.RECEIVED

    world.order(JobKind.VERIFY, FINISH)
    again = world.reconciler()

    async def verified() -> bool:
        return (await world.registry.version("support@1")).state is VersionState.VERIFIED

    await tick_until(again, verified)


@pytest.fixture
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconciler_module, "FILES_LOOK_S", 0.01)


@pytest.mark.usefixtures("_look_often")
async def test_files_that_changed_on_disk_wait_with_their_verification_until_they_are_published_again(
    world: World,
) -> None:
    world.order(JobKind.VERIFY, FINISH)
    version = await world.published(state=VersionState.RECEIVED)
    weights = world.registry.directory(version) / "adapter_model.safetensors"
    weights.chmod(0o600)
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    reconciler = world.reconciler()

    await reconciler.tick()
    await reconciler.tick()

    found = await world.registry.version(version.name)
    assert (found.state, found.state_code) == (VersionState.RECEIVED, "digest_mismatch")
    assert "publish the same bundle again" in str(found.state_reason)
    assert [(job.state, job.attempt) for job in await world.store.list()] == [(JobState.QUEUED, 0)]

    again, _ = await world.registry.publish(
        "support", world.orders / "bundle-7", actor="key:tester", project_id=version.project_id
    )
    assert again.id == version.id

    async def verified() -> bool:
        return (await world.registry.version(version.name)).state is VersionState.VERIFIED

    await tick_until(reconciler, verified)
    assert (await world.registry.version(version.name)).state_code is None


@pytest.mark.usefixtures("_look_often")
async def test_a_job_restores_what_it_published_and_the_disk_damaged(world: World) -> None:
    job = await world.fine_tuning()
    reconciler = world.reconciler()

    async def published() -> bool:
        return bool(await world.registry.versions())

    await tick_until(reconciler, published)
    (version,) = await world.registry.versions()
    (world.registry.directory(version) / "adapter_model.safetensors").unlink()

    ended = await run_to_end(world, reconciler, job)

    assert ended.state is JobState.SUCCEEDED
    world.registry.verify_files(version)


@pytest.mark.usefixtures("_look_often")
async def test_a_disk_that_does_not_answer_costs_a_version_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.order(JobKind.VERIFY, FINISH)
    version = await world.published(state=VersionState.RECEIVED)
    answers = iter([OSError(errno.EMFILE, "Too many open files"), OSError(errno.EIO, "Input/output error")])
    real = Artifacts._digest_of

    def failing(self: Artifacts, directory: Path) -> str | None:
        if (error := next(answers, None)) is not None:
            raise error
        return real(self, directory)

    monkeypatch.setattr(Artifacts, "_digest_of", failing)

    async def verified() -> bool:
        return (await world.registry.version(version.name)).state is VersionState.VERIFIED

    await tick_until(world.reconciler(), verified)


async def test_files_that_change_under_a_verification_are_no_verdict_on_the_version(world: World) -> None:
    changed = {"do": "fail", "code": "digest_mismatch", "message": "the files changed"}
    world.order(JobKind.VERIFY, changed, FINISH)
    version = await world.published(state=VersionState.RECEIVED)

    async def verified() -> bool:
        return (await world.registry.version(version.name)).state is VersionState.VERIFIED

    await tick_until(world.reconciler(), verified)


# ---- evaluations ----


async def test_an_evaluation_stores_its_verdict_and_revokes_its_key(world: World) -> None:
    version = await world.published()
    job, created = await world.service.create_evaluation("support@1", "emails", principal=PRINCIPAL)

    ended = await run_to_end(world, world.reconciler(), job)

    assert created
    assert ended.state is JobState.SUCCEEDED
    assert ended.result is not None
    assert ended.result["verdict"] == "passed"
    [verdict] = await world.rows(tables.verdicts)
    assert (verdict["digest"], verdict["suite"], verdict["verdict"], verdict["baseline"], verdict["looks"]) == (
        version.digest,
        "emails",
        "passed",
        world.base.digest,
        1,
    )
    assert (verdict["job_id"], verdict["created_by"]) == (job.id, "key:tester")
    assert await world.rows(tables.api_keys) == []
    key_rows = [row for row in await world.rows(tables.audit) if row["action"].startswith("key.")]
    assert [(row["action"], row["actor"], row["subject"]) for row in key_rows] == [
        ("key.create", "controller", f"{job.id} attempt 1"),
        ("key.revoke", "controller", f"{job.id} attempt 1"),
    ]
    assert key_rows[0]["after"]["scopes"] == ["evaluate", "inference", "preview"]
    assert (world.attempt_dir(job) / "report.md").exists()


async def test_the_evaluator_gets_the_suite_the_weights_and_a_key_of_its_own(world: World) -> None:
    version = await world.published()
    job, _ = await world.service.create_evaluation("support@1", "emails", principal=PRINCIPAL)
    world.order(JobKind.EVALUATION, {"do": "hang"})
    await until_started(world, job)

    seen = world.seen(job)
    spec = seen["spec"]
    assert Path(spec["suite_dir"]).name == "emails"
    assert suite_digest(Path(spec["suite_dir"])) == spec["suite_digest"]
    assert {key: spec[key] for key in ("target", "digest", "base_model", "stable", "stable_digest", "look")} == {
        "target": "support@1",
        "digest": version.digest,
        "base_model": "tiny",
        "stable": "tiny",
        "stable_digest": world.base.digest,
        "look": 1,
    }
    assert spec["stable_adapter_dir"] is None
    raw = seen["env"]["TURNOUT_API_KEY"]
    [key] = await world.rows(tables.api_keys)
    assert world.keys.hash(raw) == key["hash"]
    assert key["revoked_at"] is None
    assert key["expires_at"] - key["created_at"] >= timedelta(seconds=MAX_ATTEMPT_S)
    assert not [path for path in world.settings.home.rglob("*") if path.is_file() and raw.encode() in path.read_bytes()]


async def test_the_evaluator_learns_what_the_version_was_trained_on(world: World) -> None:
    first = await run_to_end(world, world.reconciler(), await world.fine_tuning())
    other = make_bundle(world.orders / "other", world.base, seed=9)
    world.order(JobKind.FINE_TUNING, FINISH | {"bundle": str(other)})
    second = await run_to_end(world, world.reconciler(), await world.fine_tuning(model="support@1"))
    job, _ = await world.service.create_evaluation("support@2", "emails", principal=PRINCIPAL)

    await run_to_end(world, world.reconciler(), job)

    names = [Path(path).name for path in world.seen(job)["spec"]["training_files"]]
    assert names == [second.spec.training_file, first.spec.training_file]  # type: ignore[union-attr]
    assert world.seen(job)["spec"]["engine_dtype"] == "bfloat16"


async def test_the_evaluator_learns_the_noise_of_the_engines_that_serve(world: World) -> None:
    await world.published()
    job, _ = await world.service.create_evaluation("support@1", "emails", principal=PRINCIPAL)
    async with world.database.write() as connection:
        for name, state, noise in (
            ("a", "ready", 0.1),
            ("b", "ready", 0.316),
            ("c", "failed", 0.9),
            ("d", "ready", None),
        ):
            row = {"id": name, "state": state, "socket": "/s", "epoch": "1", "self_test": "passed", "revision": 0}
            await connection.execute(insert(tables.replicas).values(batch_noise=noise, **row))

    await run_to_end(world, world.reconciler(), job)

    assert world.seen(job)["spec"]["batch_noise"] == 0.316


async def test_each_attempt_gets_its_own_key(world: World) -> None:
    await world.published()
    world.order(JobKind.EVALUATION, {"do": "crash"}, FINISH)
    job, _ = await world.service.create_evaluation("support@1", "emails", principal=PRINCIPAL)

    await run_to_end(world, world.reconciler(), job)

    assert world.seen(job, 1)["env"]["TURNOUT_API_KEY"] != world.seen(job, 2)["env"]["TURNOUT_API_KEY"]
    made = [row["subject"] for row in await world.rows(tables.audit) if row["action"] == "key.create"]
    assert made == [f"{job.id} attempt 1", f"{job.id} attempt 2"]
    assert await world.rows(tables.api_keys) == []


async def test_an_attempt_that_is_launched_again_gets_a_fresh_key(world: World) -> None:
    await world.published()
    job, _ = await world.service.create_evaluation("support@1", "emails", principal=PRINCIPAL)
    name = f"{job.id} attempt 1"
    left, _ = await world.keys.create(name, ["evaluate"], actor="controller")

    ended = await run_to_end(world, world.reconciler(), job)

    assert ended.state is JobState.SUCCEEDED
    assert world.seen(job)["env"]["TURNOUT_API_KEY"]
    assert left.name == name
    assert await world.rows(tables.api_keys) == []


async def test_a_suite_that_changed_after_the_request_is_not_run(world: World) -> None:
    await world.published()
    job, _ = await world.service.create_evaluation("support@1", "emails", principal=PRINCIPAL)
    (world.orders / "suites" / "emails" / "suite.yaml").write_text("name: easier\n")

    ended = await run_to_end(world, world.reconciler(), job)

    assert (ended.state, ended.error_code) == (JobState.FAILED, "suite_changed")


async def test_an_evaluation_waits_until_its_version_is_loaded(served: World) -> None:
    version = await served.published()
    job, _ = await served.service.create_evaluation("support@1", "emails", principal=PRINCIPAL)
    reconciler = served.reconciler()
    for _ in range(3):
        await reconciler.tick()
    assert (await served.job(job)).state is JobState.QUEUED

    await served.set_residency(version, "ready")

    assert (await run_to_end(served, reconciler, job)).state is JobState.SUCCEEDED


async def test_an_evaluation_of_a_version_that_cannot_be_loaded_fails(served: World) -> None:
    version = await served.published()
    job, _ = await served.service.create_evaluation("support@1", "emails", principal=PRINCIPAL)
    await served.set_residency(version, "quarantined", code="probe_parity", reason="not what was verified")

    ended = await run_to_end(served, served.reconciler(), job)

    assert (ended.state, ended.error_code) == (JobState.FAILED, "probe_parity")


async def test_a_result_without_a_verdict_fails_the_evaluation(world: World) -> None:
    await world.published()
    world.order(JobKind.EVALUATION, FINISH | {"data": {"verdict": "splendid"}})
    job, _ = await world.service.create_evaluation("support@1", "emails", principal=PRINCIPAL)

    ended = await run_to_end(world, world.reconciler(), job)

    assert (ended.state, ended.error_code) == (JobState.FAILED, "bad_verdict")
    assert await world.rows(tables.verdicts) == []


# ---- the environment ----


@pytest.mark.invariant(11)
async def test_a_job_inherits_no_secret(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "TURNOUT_DATABASE_URL",
        "TURNOUT_ADMIN_KEY",
        "DATABASE_URL",
        "AWS_SECRET_ACCESS_KEY",
        "PYTHONPATH",
        "LD_PRELOAD",
    ):
        monkeypatch.setenv(name, "secret-of-ours" if name != "LD_PRELOAD" else "")
    job = await world.fine_tuning()

    await run_to_end(world, world.reconciler(), job)

    env = world.seen(job)["env"]
    assert set(env) == {
        "PATH", "HOME", "LANG", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM",
        "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONUNBUFFERED", "PYTHONSAFEPATH", "TURNOUT_CHILD",
        "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_",
    } | ({"LC_CTYPE"} & set(env))  # fmt: skip
    assert "secret-of-ours" not in json.dumps(env)
    assert env["HF_HUB_OFFLINE"] == "1"
    assert env["HOME"] == str(world.settings.jobs_dir / job.id)
    assert Path(world.seen(job)["cwd"]) == world.attempt_dir(job)


@pytest.mark.mutant(11)
async def test_a_job_that_inherited_everything_would_be_seen(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "gateway.jobs.launch.environment", lambda *args, **named: dict(os.environ) | environment(*args, **named)
    )

    with pytest.raises(AssertionError):
        await test_a_job_inherits_no_secret(world, monkeypatch)


async def test_the_token_is_readable_by_us_only(world: World) -> None:
    world.order(JobKind.FINE_TUNING, {"do": "hang"})
    job = await world.fine_tuning()
    await until_started(world, job)

    spec = world.attempt_dir(job) / "spec.json"
    assert (spec.stat().st_mode & 0o777, spec.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    token = world.seen(job)["spec"]["token"]
    assert token not in json.dumps(await world.rows(tables.job_attempts), default=str)


async def test_one_job_at_a_time_and_verification_first(world: World) -> None:
    world.order(JobKind.FINE_TUNING, {"do": "hang"})
    first = await world.fine_tuning(suffix="one")
    await until_started(world, first)
    second = await world.fine_tuning(suffix="two")
    await world.published(state=VersionState.RECEIVED)
    reconciler = world.reconciler()
    for _ in range(5):
        await reconciler.tick()
        await asyncio.sleep(0.01)
    running = [job for job in await world.store.unfinished() if job.state is JobState.RUNNING]
    assert running == [await world.job(first)]

    (world.orders / "release").touch()
    await run_to_end(world, reconciler, second)

    starts = {row["job_id"]: row["started_at"] for row in await world.rows(tables.job_attempts)}
    of_version = (await world.store.list(kinds={JobKind.VERIFY}))[-1]
    assert starts[first.id] < starts[of_version.id] < starts[second.id]
