"""From a trained bundle to a version that can be served: publish it, then wait until it is verified, loaded and probed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..database import Database
from ..errors import Conflict, GatewayError, Refused, StorageFull, Unavailable
from ..names import parse_pin
from ..registry.models import AdapterVersion
from ..registry.service import Registry
from ..settings import Settings
from .endings import Endings
from .launch import attempt_directory
from .models import FineTuningSpec, Job, JobState
from .residence import Residence
from .store import JobStore


class Publisher:
    """Moves jobs on that are `publishing`."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        store: JobStore,
        registry: Registry,
        endings: Endings,
        residence: Callable[[AdapterVersion], Awaitable[Residence]],
    ) -> None:
        self._database = database
        self._settings = settings
        self._store = store
        self._registry = registry
        self._endings = endings
        self._residence = residence

    async def advance(self, job: Job) -> None:
        """Publish the bundle (again gives the same version), then wait until the version can be served."""
        if job.cancel_requested:
            await self._endings.cancel(job)
            return
        found = job.result or {}
        if "version" not in found:
            version = await self._published(job)
            if version is None:
                return
            found = {**found, "version": version.name, "digest": version.digest}
            async with self._database.write() as connection:
                job = await self._store.move(connection, job, result=found)
                await self._store.add_event(connection, job.id, f"Published {version.name}; verifying and loading it")
        version = await self._registry.version(found["version"])
        residence = await self._residence(version)
        if residence.state == "ready":
            final = {**found, "fine_tuned_model": version.name}
            await self._endings.end(job, JobState.SUCCEEDED, result=final, message="The job has successfully completed")
        elif residence.code == "digest_mismatch":
            await self._restore(job, version)
        elif residence.state != "waiting":
            reason = f"{version.name} was trained, but cannot be served: {residence.reason}"
            await self._endings.fail(job, residence.code or "not_servable", reason)

    async def _restore(self, job: Job, version: AdapterVersion) -> None:
        """Make damaged files whole again: nobody else has them. Verification and engines then look again by themselves."""
        try:
            await asyncio.to_thread(self._registry.verify_files, version)
        except Refused:
            await self._published(job)

    async def _published(self, job: Job) -> AdapterVersion | None:
        """The version of the current attempt's bundle; None when it was refused, which ends the job.

        Training that repeats an earlier one to the bit gives the version that came of it.
        """
        spec = job.spec
        assert isinstance(spec, FineTuningSpec)  # noqa: S101
        bundle = attempt_directory(self._settings, job.id, job.attempt) / "bundle"
        parent = spec.model if parse_pin(spec.model) else None
        try:
            version, _ = await self._registry.publish(
                spec.adapter, bundle, actor=job.created_by, project_id=job.project_id, job_id=job.id, parent=parent
            )
        except (StorageFull, Unavailable):
            raise  # the machine's fault: the job stays where it is and tries again
        except Conflict as error:
            if error.code == "manifest_conflict" and error.param is not None:
                return await self._registry.version(error.param)
            if error.code == "busy":
                raise
            await self._endings.fail(job, error.code, f"the trained adapter cannot be published: {error.message}")
            return None
        except GatewayError as error:
            await self._endings.fail(job, error.code, f"the trained adapter was refused: {error.message}")
            return None
        return version
