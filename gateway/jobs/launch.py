"""How an attempt starts: its program, its environment, and its directory with `spec.json`."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import sys
from collections.abc import Collection, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import structlog

from ..database import Database
from ..errors import NotFound, Refused
from ..ids import now
from ..keys import ApiKey, Keys
from ..names import parse_pin
from ..registry.models import AdapterVersion
from ..registry.service import Registry
from ..settings import Settings
from .allocator import ALLOCATOR
from .local import Jobs
from .models import EvaluationSpec, FineTuningSpec, Job, JobKind, ProcessSpec, VerifySpec
from .output import LOG_FILE, PROGRESS_FILE, RESULT_FILE
from .residence import batch_noise
from .store import JobStore
from .suites import Suites, copy_suite, suite_digest
from .training import training_config

log = structlog.get_logger(__name__)

ACTOR = "controller"
MAX_ATTEMPT_S = 7 * 24 * 3600.0
KEY_LIFETIME = timedelta(
    seconds=MAX_ATTEMPT_S, hours=1
)  # made before the attempt starts, and useless as soon as it ends
MAX_ANCESTORS = 50

PROGRAMS: Mapping[JobKind, tuple[str, ...]] = {
    JobKind.FINE_TUNING: (sys.executable, "-m", "trainer.job"),
    JobKind.VERIFY: (sys.executable, "-m", "evals.verify"),
    JobKind.EVALUATION: (sys.executable, "-m", "evals.job"),
}
SPEC_FILE = "spec.json"
_KEPT = frozenset({LOG_FILE, f"{LOG_FILE}.1", PROGRESS_FILE, RESULT_FILE, "report.md"})
_MAX_KEPT_BYTES = 64 * 2**20


class Launcher:
    """Starts attempts through a driver."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        store: JobStore,
        registry: Registry,
        keys: Keys,
        suites: Suites,
        driver: Jobs,
        *,
        programs: Mapping[JobKind, tuple[str, ...]] = PROGRAMS,
    ) -> None:
        self._database = database
        self._settings = settings
        self._store = store
        self._registry = registry
        self._keys = keys
        self._suites = suites
        self._driver = driver
        self._programs = programs

    async def launch(self, job: Job, token: str) -> None:
        """Prepare the attempt's directory and start its process. What the job is about is hashed again first."""
        directory = attempt_directory(self._settings, job.id, job.attempt)
        await asyncio.to_thread(prepare_attempt, directory)
        spec, extra = await self._spec_of(job, directory)
        await asyncio.to_thread(write_spec, directory, {"token": token, **spec})
        home = job_directory(self._settings, job.id)
        await self._driver.submit(
            ProcessSpec(
                job_id=job.id,
                attempt=job.attempt,
                argv=(*self._programs[job.kind], str(directory)),
                env=environment(self._settings, home, extra=extra),
                output=str(directory),
                timeout_s=MAX_ATTEMPT_S,
            )
        )

    async def _spec_of(self, job: Job, directory: Path) -> tuple[dict[str, Any], dict[str, str]]:
        match job.spec:
            case FineTuningSpec():
                return {"config": await self._training_config(job.spec)}, {}
            case VerifySpec():
                return await self._verify_spec(job.spec), {}
            case EvaluationSpec():
                return await self._evaluation_spec(job.spec, directory), await self._evaluator_env(job)

    async def _training_config(self, spec: FineTuningSpec) -> dict[str, Any]:
        parent = await self._checked_version(spec.model) if parse_pin(spec.model) else None
        return training_config(
            spec,
            base=self._registry.base,
            files_dir=self._settings.files_dir,
            init_from=self._registry.directory(parent) if parent else None,
            threads=job_threads(self._settings),
        )

    async def _verify_spec(self, spec: VerifySpec) -> dict[str, Any]:
        version = await self._checked_version(spec.target)
        return {
            "base_model_path": str(self._registry.base.path),
            "base_digest": self._registry.base.digest,
            "adapter_dir": str(self._registry.directory(version)),
            "digest": version.digest,
            "threads": job_threads(self._settings),
        }

    async def _evaluation_spec(self, spec: EvaluationSpec, directory: Path) -> dict[str, Any]:
        """The suite is copied, so that what runs is what the verdict will name."""
        copied = directory / "suite" / spec.suite
        suite = await asyncio.to_thread(self._suites.find, spec.suite)
        await asyncio.to_thread(copy_suite, suite.path, copied)
        if await asyncio.to_thread(suite_digest, copied) != spec.suite_digest:
            raise Refused(
                f"suite {spec.suite!r} changed since the evaluation was asked for; ask again", code="suite_changed"
            )
        version = await self._checked_version(spec.target)
        stable = await self._checked_version(spec.stable) if parse_pin(spec.stable) else None
        base = self._registry.base
        return {
            "suite_dir": str(copied),
            "suite_digest": spec.suite_digest,
            "target": spec.target,
            "digest": spec.digest,
            "base_model": base.name,
            "base_model_path": str(base.path),
            "base_digest": base.digest,
            "stable": spec.stable,
            "stable_digest": stable.digest if stable else base.digest,
            "stable_adapter_dir": str(self._registry.directory(stable)) if stable else None,
            "adapter_dir": str(self._registry.directory(version)),
            "reference": str(self._settings.references_dir / f"{version.digest}.json"),
            "scores_dir": str(self._settings.scores_dir),
            "look": spec.look,
            "training_files": [str(path) for path in await self._training_files(version)],
            "engine_dtype": self._settings.engine.dtype,
            "batch_noise": await batch_noise(self._database),
            "threads": job_threads(self._settings),
        }

    async def _training_files(self, version: AdapterVersion) -> list[Path]:
        """What the version and its ancestors were trained on, as far as it was uploaded here and is still there."""
        found: list[Path] = []
        for _ in range(MAX_ANCESTORS):
            if version.job_id is not None:
                spec = (await self._store.get(version.job_id)).spec
                if isinstance(spec, FineTuningSpec):
                    found.append(self._settings.files_dir / spec.training_file)
            if version.parent is None:
                break
            try:
                version = await self._registry.version(version.parent)
            except NotFound:  # trained on from a version of another server
                break
        return [path for path in found if path.is_file()]

    async def _checked_version(self, name: str) -> AdapterVersion:
        version = await self._registry.version(name)
        await asyncio.to_thread(self._registry.verify_files, version)
        return version

    async def _evaluator_env(self, job: Job) -> dict[str, str]:
        """A key of this attempt's own. Only the child's environment ever holds it."""
        await self.revoke_keys(job)
        _, raw = await self._keys.create(
            f"{job.id} attempt {job.attempt}",
            ("evaluate", "inference", "preview"),
            actor=ACTOR,
            project_id=job.project_id,
            expires_at=now() + KEY_LIFETIME,
        )
        return {"TURNOUT_URL": self._settings.url, "TURNOUT_API_KEY": raw}

    async def revoke_keys(self, job: Job) -> None:
        """Make every key that attempts of this job got useless, and forget it: one for each attempt would pile up."""
        if job.kind is JobKind.EVALUATION:
            for key in await self._own_keys(job.project_id):
                if key.name.startswith(f"{job.id} "):
                    await self._keys.discard(key, ACTOR)

    async def revoke_stale_keys(self, unfinished: Collection[str], *, project_ids: Collection[str]) -> None:
        """The same for every job that is over."""
        for project_id in project_ids:
            for key in await self._own_keys(project_id):
                if key.name.partition(" ")[0] not in unfinished:
                    await self._keys.discard(key, ACTOR)

    async def _own_keys(self, project_id: str) -> list[ApiKey]:
        keys = await self._keys.list(project_id=project_id)
        return [key for key in keys if key.created_by == ACTOR and "evaluate" in key.scopes]


def job_threads(settings: Settings) -> int:
    """CPU threads of a job."""
    return settings.jobs.threads or len(os.sched_getaffinity(0))


def environment(settings: Settings, home: Path, *, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """All that a job's process inherits. Nothing of ours passes but what is named here: no database URL, no key."""
    threads = str(job_threads(settings))
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(home),  # caches land in the job's directory, and the owner's home is no part of a job
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "HF_HOME": str(home / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a file that a job writes is never imported by the next
        **ALLOCATOR,
        **(extra or {}),
    }


def job_directory(settings: Settings, job_id: str) -> Path:
    """Everything of one job."""
    return settings.jobs_dir / job_id


def attempt_directory(settings: Settings, job_id: str, attempt: int) -> Path:
    """One attempt's own directory."""
    return job_directory(settings, job_id) / str(attempt)


def prepare_attempt(directory: Path) -> None:
    """An empty private directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.mkdir(mode=0o700)


def write_spec(directory: Path, spec: Mapping[str, Any]) -> None:
    """Leave `spec.json` for the process; it holds the attempt's token, so only we may read it."""
    descriptor = os.open(directory / SPEC_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(orjson.dumps(spec))


def clean_job(directory: Path) -> None:
    """Keep what explains a finished job (logs, result, report for people), and give the rest of its disk back.

    What it made unreadable stays and is told: the job is over all the same.
    """
    try:
        for path in directory.iterdir() if directory.is_dir() else ():
            if path.name.isdigit() and path.is_dir() and not path.is_symlink():
                for inner in path.iterdir():
                    if inner.name not in _KEPT or not _is_small_file(inner):
                        _remove(inner)
            else:
                _remove(path)
    except OSError as error:
        log.warning("job's directory not cleaned", directory=str(directory), error=str(error))


def _is_small_file(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_size <= _MAX_KEPT_BYTES


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
