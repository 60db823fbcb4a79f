"""Publishing and looking up adapter versions."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from ..audit import record_audit
from ..database import Database, bump_revision
from ..errors import Conflict, Invalid, NotFound, Refused
from ..ids import new_id, now
from ..names import NAME_PATTERN
from ..settings import Settings
from . import store
from .artifacts import Artifacts
from .base_family import BaseFamily
from .manifest import CONFIG_FILE, VERSION_PATTERN, WEIGHTS_FILE, Manifest, manifest_digest
from .models import Adapter, AdapterVersion, VersionState
from .preflight import Preflighted, preflight

OnPublish = Callable[[AsyncConnection, AdapterVersion], Awaitable[None]]

_ATTEMPTS = 20  # each is lost only to a publish of the same adapter that won
# Where a version may go from each state; what is not here is final. Received it may stay, for a reason: damaged files.
_MOVES = {
    VersionState.RECEIVED: {
        VersionState.RECEIVED,
        VersionState.VERIFIED,
        VersionState.REJECTED,
        VersionState.QUARANTINED,
    },
    VersionState.VERIFIED: {VersionState.QUARANTINED},
}
log = structlog.get_logger(__name__)


class Registry:
    """Adapters and their immutable versions, of one base model."""

    def __init__(
        self, database: Database, settings: Settings, base: BaseFamily, *, on_publish: Sequence[OnPublish] = ()
    ) -> None:
        self.base = base
        self._database = database
        self._settings = settings
        self._on_publish = tuple(on_publish)
        self._artifacts = Artifacts(settings.artifacts_dir, settings.manifests_dir)
        # One at a time: every thread more that computes is one more turn that requests wait for.
        self._checking = asyncio.Lock()

    async def start(self) -> None:
        """Remove what publishes of dead processes left half-done; what another process is at stays."""
        try:
            removed = await asyncio.to_thread(self._artifacts.clean)
        except OSError as error:  # left-overs only take room
            log.warning("staging not cleaned", error=str(error))
            return
        if removed:
            log.info("staging cleaned", directories=removed)

    def staging(self) -> AbstractContextManager[Path]:
        """A private directory on the artifacts' disk for an upload; gone when the block ends."""
        return self._artifacts.staging()

    async def publish(
        self,
        adapter: str,
        source: Path,
        *,
        actor: str,
        project_id: str,
        job_id: str | None = None,
        parent: str | None = None,
    ) -> tuple[AdapterVersion, bool]:
        """Check a bundle, or a plain PEFT folder, and make it the adapter's next version; whether it is new.

        The same bytes again are the same version, back from retirement if it was there. Raises `Refused` with a code of `REASONS`, `Invalid` for a bad name,
        `Conflict` when the same weights come with another manifest or the name is another project's.
        """
        self._check_name(adapter)
        if parent is not None and not re.fullmatch(VERSION_PATTERN, parent):
            raise Invalid(f"parent {parent!r} is not a version such as support@1", code="bad_parent", param="parent")
        for _ in range(_ATTEMPTS):
            async with self._checking:
                checked, manifest = await asyncio.to_thread(self._receive, adapter, source, parent)
            draft = self._draft(adapter, checked, manifest, actor=actor, project_id=project_id, job_id=job_id)
            recorded = await self._try_to_record(draft, claims_manifest=checked.manifest is not None)
            # Files that only retired versions had may have been removed before the record said that they are needed.
            if recorded is not None and self.directory(recorded[0]).exists():
                return recorded
        raise Conflict(f"adapter {adapter!r} is being published to without pause; try again", code="busy")

    async def adapters(self) -> list[Adapter]:
        """Every adapter with its versions."""
        async with self._database.read() as connection:
            return await store.read_adapters(connection)

    async def adapter(self, name: str) -> Adapter:
        """One adapter. Raises `NotFound`."""
        async with self._database.read() as connection:
            found = await store.read_adapter(connection, name)
        if found is None:
            raise NotFound(
                f"adapter {name[:80]!r} does not exist; publish its first version",
                code="adapter_not_found",
                param=name[:80],
            )
        return found

    async def version(self, name: str) -> AdapterVersion:
        """The version called `support@3`. Raises `NotFound`."""
        adapter, _, number = name.partition("@")
        found = None
        if re.fullmatch(VERSION_PATTERN, name):
            async with self._database.read() as connection:
                found = await store.read_version(connection, adapter, int(number))
        if found is None:
            raise NotFound(
                f"version {name[:80]!r} does not exist; `turnout adapters list` shows those that do",
                code="version_not_found",
                param=name[:80],
            )
        return found

    async def versions(self, *, states: Collection[VersionState] | None = None) -> list[AdapterVersion]:
        """Every version, or those in some states; by adapter, oldest first."""
        async with self._database.read() as connection:
            return await store.read_versions(connection, states=states)

    async def set_state(
        self, version_id: str, state: VersionState, *, code: str | None, reason: str | None, actor: str
    ) -> AdapterVersion:
        """Move a version on; the state it is in already is no move, but may get a reason while it is `received`.

        Raises `Conflict` for a move backwards or out of a final state.
        """
        if state in (VersionState.REJECTED, VersionState.QUARANTINED) and not code:
            raise Invalid(f"a version becomes {state} for a reason: give its code", code="missing_code", param="code")
        async with self._database.write() as connection:
            version = await store.read_version_by_id(connection, version_id)
            if version is None:
                raise NotFound(f"version id {version_id!r} does not exist", code="version_not_found", param=version_id)
            allowed = _MOVES.get(version.state, set())
            if version.state is state and (state not in allowed or version.state_code == code):
                return version
            if state not in allowed or not await store.update_state(
                connection, version, state=state, code=code, reason=reason
            ):
                raise Conflict(
                    f"{version.name} is {version.state} and cannot become {state}",
                    code="state_final",
                    param=version.name,
                )
            await record_audit(
                connection, project_id=version.project_id, actor=actor, action="version.state", subject=version.name,
                before={"state": version.state}, after={"state": state, "code": code}, reason=reason,
            )  # fmt: skip
            await bump_revision(connection)
        log.info("version moved", version=version.name, state=state, code=code, reason=reason)
        return version.model_copy(update={"state": state, "state_code": code, "state_reason": reason})

    def directory(self, version: AdapterVersion) -> Path:
        """Where the version's two files are; the path an engine loads."""
        return self._artifacts.directory(version.digest)

    def set_aside(self, version: AdapterVersion, into: Path) -> None:
        """Move the version's files out of where they are looked for. For whoever knows that nobody needs them."""
        self._artifacts.set_aside(version.digest, into)

    def manifest(self, version: AdapterVersion) -> Manifest:
        """Where the version comes from."""
        return self._artifacts.manifest(version.manifest_digest)

    def verify_files(self, version: AdapterVersion) -> None:
        """Hash the version's files again. Raises `Refused(code="digest_mismatch")` when they changed, `Unavailable` when
        the disk does not let us know. Reads all of them."""
        self._artifacts.verify(version.digest)

    def _check_name(self, adapter: str) -> None:
        if not re.fullmatch(NAME_PATTERN.removeprefix("^").removesuffix("$"), adapter):
            raise Invalid(
                f"adapter name {adapter[:80]!r} is not allowed; use 1 to 48 of a-z, 0-9 and -, a letter or digit first",
                code="bad_name", param="adapter",
            )  # fmt: skip
        if adapter == self.base.name:
            raise Invalid(
                f"{adapter!r} is the base model's name; choose another for the adapter",
                code="name_taken",
                param="adapter",
            )

    def _receive(self, adapter: str, source: Path, parent: str | None) -> tuple[Preflighted, Manifest]:
        """Copy, check, and make durable; whatever is not yet named by a version is harmless."""
        limits = self._settings.limits
        with self._artifacts.staging() as staged:
            self._artifacts.copy_in(
                source, staged, max_weights_bytes=limits.adapter_bytes, max_text_bytes=limits.config_bytes
            )
            checked = preflight(
                staged, self.base, max_rank=self._settings.engine.max_lora_rank, max_weights_bytes=limits.adapter_bytes
            )
            directory = self._artifacts.install(staged, checked)
            manifest = _published_manifest(adapter, checked, self.base, parent)
            self._artifacts.store_manifest(manifest)
        log.info("bundle received", adapter=adapter, digest=checked.digest, directory=str(directory))
        return checked, manifest

    def _draft(
        self, adapter: str, checked: Preflighted, manifest: Manifest, *, actor: str, project_id: str, job_id: str | None
    ) -> AdapterVersion:
        return AdapterVersion(
            id=new_id("ver-"), adapter=adapter, version=1, base_model=self.base.name, base_digest=self.base.digest,
            rank=checked.rank, digest=checked.digest, manifest_digest=manifest_digest(manifest), size_bytes=checked.size_bytes,
            parent=manifest.parent, job_id=job_id, state=VersionState.RECEIVED, created_at=now(), created_by=actor, project_id=project_id,
        )  # fmt: skip

    async def _try_to_record(
        self, draft: AdapterVersion, *, claims_manifest: bool
    ) -> tuple[AdapterVersion, bool] | None:
        for _ in range(_ATTEMPTS):
            try:
                return await self._record(draft, claims_manifest=claims_manifest)
            except IntegrityError:  # somebody else took the name or the number first: look again
                continue
        return None

    async def _record(self, draft: AdapterVersion, *, claims_manifest: bool) -> tuple[AdapterVersion, bool]:
        async with self._database.write() as connection:
            owner = await store.read_owner(connection, draft.adapter)
            if owner not in (None, draft.project_id):
                raise Conflict(
                    f"the name {draft.adapter!r} is taken; choose another", code="name_taken", param="adapter"
                )
            existing = await store.read_version_by_digest(connection, draft.adapter, draft.digest)
            if existing is not None:
                found = _same(existing, draft, claims_manifest=claims_manifest)
                return await _unretired(connection, found, actor=draft.created_by), False
            number = await store.next_number(connection, draft.adapter)
            version = draft.model_copy(update={"version": number})
            if await store.read_adapter(connection, version.adapter) is None:
                await store.insert_adapter(connection, {
                    "name": version.adapter, "project_id": version.project_id,
                    "created_at": version.created_at, "created_by": version.created_by,
                })  # fmt: skip
            await store.insert_version(connection, version)
            await record_audit(
                connection, project_id=version.project_id, actor=version.created_by, action="version.publish", subject=version.name,
                after={"digest": version.digest, "manifest_digest": version.manifest_digest, "job_id": version.job_id, "parent": version.parent},
            )  # fmt: skip
            for callback in self._on_publish:
                await callback(connection, version)
            await bump_revision(connection)
        log.info("version published", version=version.name, digest=version.digest, job_id=version.job_id)
        return version, True


async def _unretired(connection: AsyncConnection, version: AdapterVersion, *, actor: str) -> AdapterVersion:
    """Who publishes a version's bytes again wants it again."""
    if version.retired_at is None:
        return version
    await store.update_retired(connection, version, retired_at=None)
    await record_audit(
        connection, project_id=version.project_id, actor=actor, action="version.restore", subject=version.name,
        before={"retired": True}, after={"retired": False}, reason="published again",
    )  # fmt: skip
    await bump_revision(connection)
    return version.model_copy(update={"retired_at": None})


def _same(existing: AdapterVersion, draft: AdapterVersion, *, claims_manifest: bool) -> AdapterVersion:
    """The version that has these bytes already. A source without a manifest claims nothing that could conflict."""
    if claims_manifest and existing.manifest_digest != draft.manifest_digest:
        raise Conflict(
            f"{existing.name} has the same weights and another manifest ({existing.manifest_digest[:12]}… against "
            f"{draft.manifest_digest[:12]}…); a published version's history is final",
            code="manifest_conflict", param=existing.name,
        )  # fmt: skip
    return existing


def _published_manifest(adapter: str, checked: Preflighted, base: BaseFamily, parent: str | None) -> Manifest:
    """The bundle's own manifest, with what was seen in place of what was said; for a plain PEFT folder only what can be known."""
    own = checked.manifest
    if own is not None and parent is not None and own.parent not in (None, parent):
        raise Refused(
            f"the manifest names parent {own.parent}, the publisher {parent}", code="bad_manifest", param="parent"
        )
    manifest = own or Manifest(
        adapter=adapter,
        base_model=base.name,
        rank=checked.rank,
        alpha=checked.alpha,
        target_modules=checked.target_modules,
    )
    return manifest.model_copy(
        update={
            "adapter": adapter,
            "rank": checked.rank,
            "alpha": checked.alpha,
            "target_modules": checked.target_modules,
            "parent": parent or manifest.parent,
            "files": {CONFIG_FILE: _config_digest(checked), WEIGHTS_FILE: checked.weights_digest},
        }
    )


def _config_digest(checked: Preflighted) -> str:
    return hashlib.sha256(checked.config_bytes).hexdigest()
