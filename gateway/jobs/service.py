"""What clients may do with jobs: ask for training and evaluations, look, cancel. The controller does the work."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Collection
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..audit import record_audit
from ..database import Database
from ..datasets.store import FileStore
from ..errors import Conflict, Invalid, NotFound
from ..ids import new_id, now
from ..keys import Principal
from ..names import NAME_PATTERN, parse_pin
from ..registry.models import AdapterVersion, VersionState
from ..registry.service import Registry
from ..settings import Settings
from .models import EvaluationSpec, FineTuningSpec, Job, JobEvent, JobKind, JobSpec, JobState
from .state_machine import first_state
from .store import JobStore
from .suites import Suites

ID_PREFIX = {JobKind.FINE_TUNING: "ftjob-", JobKind.VERIFY: "verify-", JobKind.EVALUATION: "evaljob-"}
MAX_IDEMPOTENCY_KEY = 255
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_CANCEL_TRIES = 5


class JobService:
    """Every method acts for a principal, and sees that principal's project only."""

    def __init__(
        self, database: Database, settings: Settings, registry: Registry, files: FileStore, suites: Suites
    ) -> None:
        self._database = database
        self._settings = settings
        self._registry = registry
        self._files = files
        self._suites = suites
        self._store = JobStore(database)

    # ---- create ----

    async def create_fine_tuning(
        self,
        *,
        principal: Principal,
        model: str,
        training_file: str,
        validation_file: str | None = None,
        suffix: str | None = None,
        preset: str | None = None,
        hyperparameters: dict[str, Any] | None = None,
        seed: int | None = None,
        metadata: dict[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> tuple[Job, bool]:
        """A job that trains and publishes a version; False when this idempotency key made it before."""
        job_id = _new_job_id(JobKind.FINE_TUNING, principal, idempotency_key)
        spec = FineTuningSpec(
            model=model,
            adapter=self._adapter_name(suffix, job_id),
            training_file=training_file,
            validation_file=validation_file,
            preset=preset,
            hyperparameters=hyperparameters or {},
            seed=seed or 0,
            suffix=suffix,
            metadata=metadata or {},
        )
        existing = await self._existing(job_id, spec, principal) if idempotency_key else None
        if existing is not None:
            return existing, False
        await self._check_model(model, principal)
        if validation_file == training_file:
            raise Invalid(
                "training_file and validation_file are the same file", code="same_file", param="validation_file"
            )
        job = _new_job(job_id, spec, principal)
        async with self._database.write() as connection:
            await _check_file(connection, training_file, "training_file", principal)
            if validation_file is not None:
                await _check_file(connection, validation_file, "validation_file", principal)
            await _check_name_is_ours(connection, spec.adapter, principal)
            if not await self._insert(connection, job):
                return _same(await self._store.get_in(connection, job_id), spec), False
            await self._store.add_event(connection, job.id, f"Created fine-tuning job: {job.id}")
        return job, True

    async def create_evaluation(
        self,
        target: str,
        suite: str,
        *,
        principal: Principal,
        larger_look: bool = False,
        idempotency_key: str | None = None,
    ) -> tuple[Job, bool]:
        """A job that runs a suite on a version. A verdict is final: asking again gives the job that reached it.

        Only a first look that was inconclusive may be followed by the one `larger_look`.
        """
        version = await self._evaluable(target, principal)
        found = await asyncio.to_thread(self._suites.find, suite)
        job_id = _new_job_id(JobKind.EVALUATION, principal, idempotency_key)
        async with self._database.write() as connection:
            stable = await _stable_of(connection, version.adapter) or self._settings.base_model.name
            baseline = await self._digest_of(connection, stable)
            spec = EvaluationSpec(
                target=version.name,
                digest=version.digest,
                suite=found.name,
                suite_digest=found.digest,
                stable=stable,
                look=2 if larger_look else 1,
            )
            earlier = await self._earlier(connection, spec, baseline, principal)
            if earlier is not None:
                return earlier, False
            job = _new_job(job_id, spec, principal)
            if not await self._insert(connection, job):
                return _same(await self._store.get_in(connection, job_id), spec), False
            await self._store.add_event(
                connection, job.id, f"Created evaluation of {spec.target} on suite {spec.suite}"
            )
        return job, True

    # ---- read ----

    async def get(self, job_id: str, *, principal: Principal, kind: JobKind | None = None) -> Job:
        """One job of the principal's project; raises `NotFound`."""
        job = await self._store.get(job_id, project_id=principal.project_id)
        if kind is not None and job.kind is not kind:
            raise NotFound(
                f"no {kind.replace('_', '-')} job has the id {job_id[:60]!r}", code="job_not_found", param="job_id"
            )
        return job

    async def list(
        self,
        *,
        principal: Principal,
        kinds: Collection[JobKind] | None = None,
        target: str | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> list[Job]:
        """Jobs, newest first; perhaps only those about one version."""
        return await self._store.list(
            project_id=principal.project_id, kinds=kinds, target=target, after=after, limit=limit
        )

    async def events(
        self, job_id: str, *, principal: Principal, after: str | None = None, limit: int = 20, newest_first: bool = True
    ) -> tuple[JobEvent, ...]:
        """What a job said."""
        job = await self.get(job_id, principal=principal)
        return tuple(await self._store.events(job.id, after=after, limit=limit, newest_first=newest_first))

    # ---- cancel ----

    async def cancel(self, job_id: str, *, principal: Principal, kind: JobKind | None = None) -> Job:
        """Stop a job: at once when nothing of it runs yet, else as soon as the controller has ended its process."""
        for _ in range(_CANCEL_TRIES):
            job = await self.get(job_id, principal=principal, kind=kind)
            if job.state is JobState.CANCELLED or (job.cancel_requested and not job.state.is_final):
                return job
            if job.state.is_final:
                raise Conflict(
                    f"job {job.id} has {job.state}; it cannot be cancelled", code="job_final", param="job_id"
                )
            if job.kind is JobKind.VERIFY:
                text = f"job {job.id} verifies {job.spec.target}; a version is served only after it, so it cannot be cancelled"  # type: ignore[union-attr]
                raise Conflict(text, code="not_cancellable", param="job_id")
            try:
                return await self._cancel_once(job, principal)
            except Conflict as error:
                if error.code != "job_moved":
                    raise
        raise Conflict(f"job {job_id} keeps changing; try again", code="job_moved", param="job_id")

    async def _cancel_once(self, job: Job, principal: Principal) -> Job:
        untouched = job.attempt == 0 and job.state in (JobState.VALIDATING_FILES, JobState.QUEUED)
        async with self._database.write() as connection:
            if untouched:
                moved = await self._store.move(connection, job, JobState.CANCELLED, cancel_requested=True)
                await self._store.add_event(connection, job.id, "The job was cancelled.")
            else:
                moved = await self._store.move(connection, job, cancel_requested=True)
                await self._store.add_event(connection, job.id, "The job is being cancelled.")
            await record_audit(
                connection,
                project_id=job.project_id,
                actor=principal.actor,
                action="job.cancel",
                subject=job.id,
                before={"state": job.state},
            )
        return moved

    # ---- checks ----

    def _adapter_name(self, suffix: str | None, job_id: str) -> str:
        name = suffix.lower() if suffix else f"ft-{job_id[-8:]}"
        if not re.fullmatch(NAME_PATTERN, name):
            text = f"suffix {suffix!r:.80} cannot name an adapter; use up to 48 lower-case letters, digits and hyphens"
            raise Invalid(text, code="bad_suffix", param="suffix")
        if name == self._settings.base_model.name:
            raise Invalid(
                f"suffix {suffix!r} is the base model's name; choose another", code="name_taken", param="suffix"
            )
        return name

    async def _check_model(self, model: str, principal: Principal) -> None:
        base = self._settings.base_model.name
        if model == base:
            return
        if parse_pin(model) is None:
            text = (
                f"model {model!r:.80} cannot be trained on; name the base model ({base}) or a version such as support@1"
            )
            raise Invalid(text, code="model_not_found", param="model")
        version = await self._visible_version(model, principal, param="model")
        _check_not_retired(version, param="model")
        if version.state is not VersionState.VERIFIED:
            text = f"{model} is {version.state}; only a verified version can be trained on from"
            raise Invalid(text, code="model_not_verified", param="model")

    async def _evaluable(self, target: str, principal: Principal) -> AdapterVersion:
        if parse_pin(target) is None:
            text = f"target {target!r:.80} does not name a version; write adapter@number, such as support@1"
            raise Invalid(text, code="bad_target", param="target")
        version = await self._visible_version(target, principal, param="target")
        _check_not_retired(version, param="target")
        if version.state is not VersionState.VERIFIED:
            why = f" ({version.state_reason})" if version.state_reason else ""
            text = f"{target} is {version.state}{why}; only a verified version can be evaluated"
            raise Conflict(text, code="not_verified", param="target")
        return version

    async def _visible_version(self, name: str, principal: Principal, *, param: str) -> AdapterVersion:
        version = await self._registry.version(name)
        if version.project_id != principal.project_id:
            raise NotFound(f"no version is called {name!r:.80}", code="version_not_found", param=param)
        return version

    async def _digest_of(self, connection: AsyncConnection, target: str) -> str:
        pin = parse_pin(target)
        if pin is None:
            return self._registry.base.digest
        table = tables.adapter_versions
        query = select(table.c.digest).where(table.c.adapter == pin[0], table.c.version == pin[1])
        return str((await connection.execute(query)).scalar_one())

    async def _earlier(
        self, connection: AsyncConnection, spec: EvaluationSpec, baseline: str, principal: Principal
    ) -> Job | None:
        """The job that answers this request already, if there is one; refuses a look that is not allowed."""
        for job in await self._store.unfinished_in(connection, kind=JobKind.EVALUATION):
            if job.spec == spec and job.project_id == principal.project_id and not job.cancel_requested:
                return job
        table = tables.verdicts
        row = (
            await connection.execute(
                select(table.c.verdict, table.c.looks, table.c.job_id)
                .where(
                    table.c.digest == spec.digest,
                    table.c.suite_digest == spec.suite_digest,
                    table.c.baseline == baseline,
                    table.c.project_id == principal.project_id,
                )
                .order_by(table.c.created_at.desc())
                .limit(1)
            )
        ).one_or_none()
        if spec.look == 2 and (row is None or row.verdict != "inconclusive" or row.looks != 1):
            had = (
                "no first look was taken" if row is None else f"the verdict is {row.verdict} after {row.looks} look(s)"
            )
            text = f"{spec.target} on {spec.suite}: {had}; a larger look only follows an inconclusive first one"
            raise Conflict(text, code="no_larger_look", param="larger_look")
        if row is None or row.verdict == "error" or spec.look == 2:
            return None
        return await self._store.get_in(connection, row.job_id)

    # ---- store ----

    async def _existing(self, job_id: str, spec: JobSpec, principal: Principal) -> Job | None:
        try:
            return _same(await self._store.get(job_id, project_id=principal.project_id), spec)
        except NotFound:
            return None

    async def _insert(self, connection: AsyncConnection, job: Job) -> bool:
        if not await self._store.insert(connection, job):
            return False
        await record_audit(
            connection,
            project_id=job.project_id,
            actor=job.created_by,
            action="job.create",
            subject=job.id,
            after=job.spec.model_dump(mode="json"),
        )
        return True


def _new_job_id(kind: JobKind, principal: Principal, idempotency_key: str | None) -> str:
    """A fresh id; with a key, the id that this key always gives, so that a repeat meets its own first row."""
    if idempotency_key is None:
        return new_id(ID_PREFIX[kind])
    if not 0 < len(idempotency_key) <= MAX_IDEMPOTENCY_KEY:
        text = f"the Idempotency-Key header must have 1 to {MAX_IDEMPOTENCY_KEY} characters"
        raise Invalid(text, code="bad_idempotency_key", param="idempotency_key")
    digest = hashlib.sha256(f"{principal.project_id}\x00{kind}\x00{idempotency_key}".encode()).digest()
    value = int.from_bytes(digest[:14], "big")
    digits = []
    for _ in range(22):
        value, digit = divmod(value, 32)
        digits.append(_ALPHABET[digit])
    return ID_PREFIX[kind] + "".join(digits)


def _same(job: Job, spec: JobSpec) -> Job:
    if job.spec != spec:
        text = f"the Idempotency-Key was used for another request, which made {job.id}; use a new key"
        raise Conflict(text, code="idempotency_mismatch", param="idempotency_key")
    return job


def _new_job(job_id: str, spec: JobSpec, principal: Principal) -> Job:
    return Job(
        id=job_id,
        kind=spec.kind,
        state=first_state(spec.kind),
        spec=spec,
        created_at=now(),
        created_by=principal.actor,
        project_id=principal.project_id,
    )


async def _check_file(connection: AsyncConnection, file_id: str, param: str, principal: Principal) -> None:
    table = tables.files
    query = select(table.c.id).where(
        table.c.id == file_id, table.c.project_id == principal.project_id, table.c.deleted_at.is_(None)
    )
    if (await connection.execute(query)).one_or_none() is None:
        text = f"{param}: no file has the id {file_id[:60]!r}; upload it first, with purpose 'fine-tune'"
        raise Invalid(text, code="file_not_found", param=param)


async def _check_name_is_ours(connection: AsyncConnection, adapter: str, principal: Principal) -> None:
    table = tables.adapters
    owner = (await connection.execute(select(table.c.project_id).where(table.c.name == adapter))).scalar_one_or_none()
    if owner is not None and owner != principal.project_id:
        raise Conflict(f"the name {adapter!r} is taken; choose another suffix", code="name_taken", param="suffix")


async def _stable_of(connection: AsyncConnection, route: str) -> str | None:
    table = tables.routes
    found = await connection.execute(select(table.c.stable).where(table.c.name == route))
    return found.scalar_one_or_none()


def _check_not_retired(version: AdapterVersion, *, param: str) -> None:
    if version.retired_at is not None:
        text = f"{version.name} is retired; `turnout adapters restore {version.name}` brings it back"
        raise Conflict(text, code="version_retired", param=param)
