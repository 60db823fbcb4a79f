"""A fine-tuning job's files before it may start: still what was uploaded, and fit for training."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ..database import Database
from ..datasets.models import DataCheck
from ..datasets.validation import check_files
from ..settings import Settings
from .endings import Endings
from .models import FineTuningSpec, Job, JobState
from .store import JobStore

MAX_WARNINGS_TOLD = 10


class FileCheck:
    """Moves jobs on that are `validating_files`."""

    def __init__(self, database: Database, settings: Settings, store: JobStore, endings: Endings) -> None:
        self._database = database
        self._settings = settings
        self._store = store
        self._endings = endings

    async def advance(self, job: Job) -> None:
        """Check the files; the job then waits for its start, or fails with what is wrong with them."""
        if job.cancel_requested:
            await self._endings.cancel(job)
            return
        spec = job.spec
        assert isinstance(spec, FineTuningSpec)  # noqa: S101
        training = self._settings.files_dir / spec.training_file
        validation = self._settings.files_dir / spec.validation_file if spec.validation_file else None
        try:
            check = await asyncio.to_thread(check_files, training, validation)
        except FileNotFoundError as error:
            await self._endings.fail(
                job, "file_lost", f"the bytes of {Path(str(error.filename)).name} are gone; upload the file again"
            )
            return
        problem = _file_problem(check) or await self._damaged(check, spec)
        if problem is not None:
            await self._endings.fail(job, *problem)
            return
        async with self._database.write() as connection:
            await self._store.move(connection, job, JobState.QUEUED)
            for message in _file_warnings(check):
                await self._store.add_event(connection, job.id, message, level="warn")
            await self._store.add_event(connection, job.id, "Files validated, moving job to queued state")

    async def _damaged(self, check: DataCheck, spec: FineTuningSpec) -> tuple[str, str] | None:
        found = {spec.training_file: check.training.digest}
        if spec.validation_file and check.validation:
            found[spec.validation_file] = check.validation.digest
        stored = await self._store.file_digests(found)
        changed = [file_id for file_id, digest in found.items() if stored.get(file_id) != digest]
        return ("file_damaged", f"{changed[0]} is not what was uploaded; upload it again") if changed else None


def _file_problem(check: DataCheck) -> tuple[str, str] | None:
    if not check.training.is_valid:
        return "invalid_training_file", f"the training file cannot be used: {check.training.summary()}"
    if check.validation is not None and not check.validation.is_valid:
        return "invalid_validation_file", f"the validation file cannot be used: {check.validation.summary()}"
    if check.leak_errors:
        return "invalid_validation_file", check.leak_errors[0].message
    return None


def _file_warnings(check: DataCheck) -> list[str]:
    told = [f"training file, {finding}" for finding in check.training.warnings[:MAX_WARNINGS_TOLD]]
    if check.validation is not None:
        told += [f"validation file, {finding}" for finding in check.validation.warnings[:MAX_WARNINGS_TOLD]]
    return told + [f"validation file, {finding}" for finding in check.leak_warnings[:MAX_WARNINGS_TOLD]]
