"""The controller's side of jobs: starts attempts, listens to them, and carries their results on. Every step may be cut short
by a crash at any point and is safe to take again; the row of the job, changed by compare-and-swap, says how far it is."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import structlog

from ..database import Database
from ..datasets.store import FileStore
from ..errors import GatewayError, Refused, StorageFull, Unavailable
from ..ids import new_id, now
from ..keys import Keys
from ..names import parse_pin
from ..processes import ProcessTable
from ..registry.models import AdapterVersion, VersionState
from ..registry.service import Registry
from ..settings import Settings
from .endings import Endings
from .file_check import FileCheck
from .guard import GIVEN_UP, Guard
from .launch import ACTOR, PROGRAMS, Launcher, attempt_directory, clean_job
from .local import Jobs, LocalJobs
from .models import (
    EvaluationSpec,
    FineTuningSpec,
    Job,
    JobKind,
    JobResult,
    JobState,
    ProcessState,
    VerifySpec,
)
from .output import exit_reason, log_tail, read_progress, read_result, trained
from .publishing import Publisher
from .residence import Residence, residence_of
from .state_machine import first_state, next_to_start, retry_delay_s
from .store import JobStore, hash_token
from .suites import Suites
from .verdicts import NewVerdict, store_verdict
from .verification import install_reference

log = structlog.get_logger(__name__)

FILES_LOOK_S = 5.0  # between looks at damaged files of a version that waits for its verification
# An evaluation raises its version's rank; engines that had no room for it have looked again by then.
RANK_PATIENCE = timedelta(seconds=15)
MAX_LOST = 10  # attempts that a stop or crash of the whole server may cost a job; they are no fault of its own


class JobReconciler:
    """`tick` looks at every unfinished job once, moves each as far as it goes, then starts what may start."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        processes: ProcessTable,
        registry: Registry,
        keys: Keys,
        suites: Suites,
        *,
        programs: Mapping[JobKind, tuple[str, ...]] = PROGRAMS,
        driver: Jobs | None = None,
        retry_delay_s: float = 1.0,
    ) -> None:
        self._database = database
        self._settings = settings
        self._registry = registry
        self._store = JobStore(database)
        self._driver = driver or LocalJobs(processes)
        self._launcher = Launcher(
            database, settings, self._store, registry, keys, suites, self._driver, programs=programs
        )
        self._endings = Endings(database, settings, self._store, self._launcher, self._driver)
        self._file_check = FileCheck(database, settings, self._store, self._endings)
        self._publisher = Publisher(database, settings, self._store, registry, self._endings, self._residence)
        self._retry_delay_s = retry_delay_s
        # What follows is lost with the process, and that does no harm: it only delays.
        self._heard: dict[tuple[str, int], float] = {}  # when an attempt last said something, monotonic
        self._not_before: dict[str, float] = {}  # back-off after a crash, monotonic
        self._given_up: dict[str, str] = {}  # version id -> why its verification died; a restart tries again
        self._guard = Guard(self._give_up)
        self._swept = False

    async def tick(self) -> None:
        """One look at everything. Raises nothing for the fault of one job."""
        if not self._swept:
            await self._sweep()
            self._swept = True
        await self._enqueue_verifications()
        jobs = await self._store.unfinished()
        self._forget_all_but(jobs)
        for job in jobs:
            await self._guard.take(job, self._step)
        await self._start_next()

    async def _give_up(self, job: Job) -> None:
        """End a job in words of our own alone: those of its own may be what nobody can write down."""
        if job.attempt:
            await self._driver.cancel(job.id, job.attempt)
        if isinstance(job.spec, VerifySpec):
            self._given_up[(await self._registry.version(job.spec.target)).id] = GIVEN_UP
        await self._endings.end(job, JobState.FAILED, outcome="crashed", code="internal_error", message=GIVEN_UP)

    def _forget_all_but(self, jobs: Sequence[Job]) -> None:
        attempts, ids = {(job.id, job.attempt) for job in jobs}, {job.id for job in jobs}
        self._heard = {attempt: at for attempt, at in self._heard.items() if attempt in attempts}
        self._not_before = {job_id: at for job_id, at in self._not_before.items() if job_id in ids}
        self._guard.forget_all_but(ids)

    async def _step(self, job: Job) -> None:
        match job.state:
            case JobState.VALIDATING_FILES:
                await self._file_check.advance(job)
            case JobState.QUEUED | JobState.PAUSED:
                if job.cancel_requested:
                    await self._endings.cancel(job)
            case JobState.RUNNING:
                await self._watch(job)
            case JobState.PUBLISHING:
                await self._publisher.advance(job)
            case JobState.SUCCEEDED | JobState.FAILED | JobState.CANCELLED:
                pass

    # ---- before the start ----

    async def _enqueue_verifications(self) -> None:
        received = await self._registry.versions(states={VersionState.RECEIVED})
        if not received:
            return
        async with self._database.write() as connection:
            verifying = await self._store.unfinished_in(connection, kind=JobKind.VERIFY)
            targets = {job.spec.target for job in verifying if isinstance(job.spec, VerifySpec)}
            for version in received:
                is_wanted = version.retired_at is None and version.id not in self._given_up
                if is_wanted and version.name not in targets:
                    await self._store.insert(connection, _verify_job(version))

    async def _start_next(self) -> None:
        tried: set[str] = set()
        while True:
            jobs = await self._store.unfinished()
            queued = [job for job in jobs if job.state is JobState.QUEUED]
            waiting = tried | {job.id for job in queued if not await self._guard.take(job, self._may_start)}
            job = next_to_start(jobs, max_running=self._settings.jobs.max_running, waiting=waiting)
            if job is None:
                return
            tried.add(job.id)
            await self._guard.take(job, self._start)

    async def _may_start(self, job: Job) -> bool:
        if time.monotonic() < self._not_before.get(job.id, 0.0):
            return False
        if not isinstance(job.spec, EvaluationSpec):
            return True
        version = await self._registry.version(job.spec.target)
        residence = await self._residence(version)
        is_new = now() - job.created_at < RANK_PATIENCE
        if residence.state == "waiting" or (residence.code == "capacity_exhausted" and is_new):
            return False  # that an evaluation asks it raises its rank
        if residence.state != "ready":
            await self._endings.fail(
                job, residence.code or "not_resident", f"{version.name} cannot be served: {residence.reason}"
            )
            return False
        return True

    async def _residence(self, version: AdapterVersion) -> Residence:
        return await residence_of(
            self._database,
            version,
            engine_enabled=self._settings.engine.enabled,
            given_up=self._given_up.get(version.id),
        )

    async def _start(self, job: Job) -> None:
        """Start the next attempt. The row comes first: from then on only this attempt may report."""
        if isinstance(job.spec, VerifySpec) and not await self._has_files(job, job.spec):
            return
        attempt, token = job.attempt + 1, secrets.token_urlsafe(32)
        async with self._database.write() as connection:
            await self._store.start_attempt(connection, job.id, attempt, token)
            job = await self._store.move(
                connection, job, JobState.RUNNING, attempt=attempt, started_at=job.started_at or now()
            )
            await self._store.add_event(connection, job.id, f"The job has started (attempt {attempt}).")
        self._heard[job.id, attempt] = time.monotonic()
        try:
            await self._launcher.launch(job, token)
        except (StorageFull, Unavailable, OSError) as error:
            await self._crashed(job, f"could not be started: {error}")
            return
        except GatewayError as error:
            await self._endings.end(job, JobState.FAILED, outcome="failed", code=error.code, message=error.message)
            return
        log.info("job started", job=job.id, kind=job.kind, attempt=attempt)

    async def _has_files(self, job: Job, spec: VerifySpec) -> bool:
        """Whether a version can be verified. Damaged files are no verdict on it: the job waits until they are published again."""
        version = await self._registry.version(spec.target)
        try:
            await asyncio.to_thread(self._registry.verify_files, version)
        except (Refused, Unavailable) as error:
            self._not_before[job.id] = time.monotonic() + FILES_LOOK_S
            log.warning("verification waits for its files", version=version.name, code=error.code, reason=error.message)
            if isinstance(error, Refused):
                await self._set_state(spec.target, VersionState.RECEIVED, code=error.code, reason=error.message)
            return False
        await self._set_state(spec.target, VersionState.RECEIVED)
        return True

    # ---- while it runs ----

    async def _watch(self, job: Job) -> None:
        directory = attempt_directory(self._settings, job.id, job.attempt)
        heard = self._heard.setdefault((job.id, job.attempt), time.monotonic())
        if await self._read_progress(job, directory):
            heard = self._heard[job.id, job.attempt] = time.monotonic()
        if job.cancel_requested:
            await self._endings.cancel(job)
            return
        status = await self._driver.status(job.id, job.attempt)  # before the result: what ends in between has left it
        runs = status.state in (ProcessState.PENDING, ProcessState.RUNNING)
        try:
            result = await self._own_result(job, directory)
        except ValueError as error:
            if not runs:
                await self._crashed(job, str(error))
            return
        if result is not None:
            await self._conclude(job, directory, result)
        elif runs:
            silent_s = time.monotonic() - heard
            if silent_s > self._settings.jobs.heartbeat_timeout_s:
                await self._crashed(job, f"said nothing for {silent_s:.0f} s")
        elif status.state is ProcessState.LOST and await self._store.count_attempts(job.id, "lost") < MAX_LOST:
            message = "the attempt ended while no controller watched it; starting again"
            await self._endings.requeue(job, outcome="lost", message=message)
        else:
            await self._crashed(job, exit_reason(status.exit_code))

    async def _read_progress(self, job: Job, directory: Path) -> bool:
        """Move what the process said into the database; True when it said something."""
        offset = (await self._store.attempt(job.id, job.attempt)).progress_offset
        reached, lines = await asyncio.to_thread(read_progress, directory, offset)
        if reached == offset:
            return False
        async with self._database.write() as connection:
            await self._store.advance_progress(connection, job, offset=reached, lines=lines)
        return True

    async def _own_result(self, job: Job, directory: Path) -> JobResult | None:
        """The result of this very attempt: only it knows its token. Raises `ValueError` for any other."""
        result = await asyncio.to_thread(read_result, directory)
        if result is None:
            return None
        expected = (await self._store.attempt(job.id, job.attempt)).token_hash
        if not hmac.compare_digest(hash_token(result.token), expected):
            raise ValueError("left a result that is not its own")
        return result

    async def _conclude(self, job: Job, directory: Path, result: JobResult) -> None:
        await self._driver.cancel(job.id, job.attempt)
        while await self._read_progress(job, directory):
            pass
        if not result.ok:
            await self._refused(job, result)
            return
        match job.spec:
            case FineTuningSpec():
                async with self._database.write() as connection:
                    await self._store.finish_attempt(connection, job.id, job.attempt, "succeeded")
                    await self._store.move(connection, job, JobState.PUBLISHING, result=trained(result.data))
            case VerifySpec():
                await self._verified(job, directory, result)
            case EvaluationSpec():
                await self._judged(job, result)

    async def _refused(self, job: Job, result: JobResult) -> None:
        code, message = result.error_code or "failed", result.error_message or "the job gave no reason"
        if isinstance(job.spec, VerifySpec):
            if code == "digest_mismatch":  # the files changed under it; the next start looks at them first
                await self._crashed(job, f"found other files than were published: {message}")
                return
            await self._set_state(job.spec.target, VersionState.REJECTED, code=code, reason=message)
        await self._endings.end(job, JobState.FAILED, outcome="failed", code=code, message=message)

    async def _verified(self, job: Job, directory: Path, result: JobResult) -> None:
        assert isinstance(job.spec, VerifySpec)  # noqa: S101
        try:
            await asyncio.to_thread(install_reference, directory, self._settings.references_dir, job.spec.digest)
        except ValueError as error:
            await self._crashed(job, str(error))
            return
        await self._set_state(job.spec.target, VersionState.VERIFIED)
        await self._endings.end(job, JobState.SUCCEEDED, outcome="succeeded", result=result.data)

    async def _set_state(
        self, target: str, state: VersionState, *, code: str | None = None, reason: str | None = None
    ) -> None:
        version = await self._registry.version(target)
        if version.state is VersionState.RECEIVED:
            await self._registry.set_state(version.id, state, code=code, reason=reason, actor=ACTOR)

    async def _judged(self, job: Job, result: JobResult) -> None:
        spec = job.spec
        assert isinstance(spec, EvaluationSpec)  # noqa: S101
        stable = await self._registry.version(spec.stable) if parse_pin(spec.stable) else None
        try:
            verdict = NewVerdict.from_result(
                spec, result.data, baseline=stable.digest if stable else self._registry.base.digest
            )
        except ValueError as error:
            await self._endings.end(job, JobState.FAILED, outcome="failed", code="bad_verdict", message=str(error))
            return
        await self._launcher.revoke_keys(job)
        async with self._database.write() as connection:
            stored = await store_verdict(connection, verdict, job)
            await self._endings.finish(
                connection,
                job,
                JobState.SUCCEEDED,
                outcome="succeeded",
                result={**result.data, **stored.model_dump(mode="json")},
            )
        await self._endings.tidy(job)

    async def _crashed(self, job: Job, why: str) -> None:
        """An attempt died without a word. Make sure of it, then try again or give up with what its log says."""
        await self._driver.cancel(job.id, job.attempt)
        crashes = await self._store.count_attempts(job.id, "crashed") + 1
        directory = attempt_directory(self._settings, job.id, job.attempt)
        tail = await asyncio.to_thread(log_tail, directory, home=self._settings.home)
        cause = f"attempt {job.attempt} {why}" + (f": {tail}" if tail else "")
        log.warning("attempt crashed", job=job.id, attempt=job.attempt, crashes=crashes, why=why)
        if crashes < self._settings.jobs.max_attempts:
            self._not_before[job.id] = time.monotonic() + retry_delay_s(crashes, first_s=self._retry_delay_s)
            await self._endings.requeue(job, outcome="crashed", message=f"{cause}; trying again")
            return
        if isinstance(job.spec, VerifySpec):
            version = await self._registry.version(job.spec.target)
            self._given_up[version.id] = cause
        await self._endings.end(job, JobState.FAILED, outcome="crashed", code="crashed", message=cause)

    async def _sweep(self) -> None:
        """Finish what a crash kept others from: abandoned uploads, disk and keys of jobs that ended."""
        await FileStore(self._database, self._settings).sweep()
        unfinished = {job.id for job in await self._store.unfinished()}
        directory = self._settings.jobs_dir
        for path in [path for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []:
            if path.name not in unfinished:
                await asyncio.to_thread(clean_job, path)
        projects = await self._store.projects()
        await self._launcher.revoke_stale_keys(unfinished, project_ids=projects)


def _verify_job(version: AdapterVersion) -> Job:
    return Job(
        id=new_id("verify-"),
        kind=JobKind.VERIFY,
        state=first_state(JobKind.VERIFY),
        spec=VerifySpec(target=version.name, digest=version.digest),
        created_at=now(),
        created_by=ACTOR,
        project_id=version.project_id,
    )
