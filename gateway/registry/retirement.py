"""Versions out of quarantine, out of what engines load, and back; and the bytes that nobody can need any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import structlog
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..audit import record_audit
from ..database import Database, bump_revision
from ..errors import Conflict, Invalid, NotFound, Refused
from ..ids import now
from ..names import engine_name
from . import store
from .models import AdapterVersion, VersionState
from .service import Registry

log = structlog.get_logger(__name__)

# Names of versions whose files an engine that runs may read again.
Held = Callable[[AsyncConnection], Awaitable[set[str]]]

MAX_REASON_CHARS = 1_000
_WHY_NOT_RELEASED = {
    VersionState.RECEIVED: "it is verified next, without being released",
    VersionState.VERIFIED: "engines may load it already",
    VersionState.REJECTED: "verification refused these very bytes and would again: publish others",
}


class Retirement:
    """What an operator does with a version that shall serve again, or never."""

    def __init__(self, database: Database, registry: Registry) -> None:
        self._database = database
        self._registry = registry

    async def release(self, name: str, *, reason: str, actor: str, project_id: str) -> AdapterVersion:
        """Out of quarantine: verified once more, then loaded and probed like a new one."""
        reason = _checked(reason)
        async with self._database.write() as connection:
            version = await _held(connection, name, project_id)
            if version.state is not VersionState.QUARANTINED:
                why = _WHY_NOT_RELEASED[version.state]
                raise Conflict(f"{name} is {version.state}, not quarantined: {why}", code="not_quarantined", param=name)
            await store.update_state(connection, version, state=VersionState.RECEIVED, code=None, reason=None)
            rows = tables.residency
            await connection.execute(delete(rows).where(rows.c.engine_name == version.engine_name))
            await bump_revision(connection)
            before = {"state": version.state, "code": version.state_code, "reason": version.state_reason}
            await _audit(
                connection, version, "version.release", actor, reason, before, {"state": VersionState.RECEIVED}
            )
        log.info("version released", version=name, actor=actor)
        return version.model_copy(update={"state": VersionState.RECEIVED, "state_code": None, "state_reason": None})

    async def retire(self, name: str, *, reason: str, actor: str, project_id: str) -> AdapterVersion:
        """Out of what engines load. Its row, digest and manifest stay; its bytes go when no engine can need them.

        Raises `Conflict(code="version_in_use")` while a route names it or a job works with it.
        """
        reason = _checked(reason)
        async with self._database.write() as connection:
            version = await _held(connection, name, project_id)
            if version.retired_at is not None:
                return version
            users = [*await _routes_with(connection, name), *await _jobs_with(connection, name)]
            if users:
                raise Conflict(
                    f"{name} is in use and cannot be retired: {'; '.join(users)}", code="version_in_use", param=name
                )
            retired_at = now()
            await store.update_retired(connection, version, retired_at=retired_at)
            await bump_revision(connection)
            await _audit(connection, version, "version.retire", actor, reason, None, {"retired": True})
        log.info("version retired", version=name, actor=actor)
        return version.model_copy(update={"retired_at": retired_at})

    async def restore(self, name: str, *, reason: str, actor: str, project_id: str) -> AdapterVersion:
        """Back from retirement, as it was. Raises `Conflict(code="bytes_gone")` when its files were removed."""
        reason = _checked(reason)
        version = await self._registry.version(name)
        try:
            await asyncio.to_thread(self._registry.verify_files, version)
        except Refused as error:
            raise _bytes_gone(name) from error
        async with self._database.write() as connection:
            version = await _held(connection, name, project_id)
            if version.retired_at is None:
                return version
            if not self._registry.directory(version).exists():  # removed since they were looked at
                raise _bytes_gone(name)
            await store.update_retired(connection, version, retired_at=None)
            await bump_revision(connection)
            await _audit(connection, version, "version.restore", actor, reason, {"retired": True}, {"retired": False})
        log.info("version restored", version=name, actor=actor)
        return version.model_copy(update={"retired_at": None})

    async def remove_unneeded_bytes(self, held: Held) -> list[str]:
        """Remove files that only retired versions have and that no engine may read again; the names of those versions."""
        retired = [version for version in await self._registry.versions() if version.retired_at is not None]
        return [
            version.name
            for version in retired
            if self._registry.directory(version).exists() and await self._remove(version, held)
        ]

    async def _remove(self, version: AdapterVersion, held: Held) -> bool:
        """Set the files aside while nobody can begin to need them, then remove them.

        Who begins to need them says so in a transaction: a publication by its record, a load by its row, before which
        it is in the ledger that `held` reads.
        """
        table = tables.adapter_versions
        with self._registry.staging() as aside:
            async with self._database.write() as connection:
                rows = (
                    (await connection.execute(select(table).where(table.c.digest == version.digest))).mappings().all()
                )
                names = {engine_name(row["adapter"], row["version"], row["digest"]) for row in rows}
                if any(row["retired_at"] is None for row in rows) or names & await held(connection):
                    return False
                await asyncio.to_thread(self._registry.set_aside, version, aside)
        log.info("bytes of a retired version removed", version=version.name, digest=version.digest)
        return True


def _bytes_gone(name: str) -> Conflict:
    return Conflict(
        f"the files of {name} are gone; publish the same bundle again, which restores the version too",
        code="bytes_gone",
        param=name,
    )


def _checked(reason: str) -> str:
    reason = reason.strip()
    if not reason:
        raise Invalid("give a `reason`; it goes into the audit log", code="reason_required", param="reason")
    if len(reason) > MAX_REASON_CHARS:
        raise Invalid(f"the reason is over {MAX_REASON_CHARS} characters", code="reason_too_long", param="reason")
    return reason


async def _held(connection: AsyncConnection, name: str, project_id: str) -> AdapterVersion:
    adapter, _, number = name.partition("@")
    found = await store.read_version(connection, adapter, int(number)) if number.isdigit() else None
    if found is None or found.project_id != project_id:
        raise NotFound(
            f"version {name[:80]!r} does not exist; `turnout adapters list` shows those that do",
            code="version_not_found",
        )
    return found


async def _audit(
    connection: AsyncConnection,
    version: AdapterVersion,
    action: str,
    actor: str,
    reason: str,
    before: object,
    after: object,
) -> None:
    await record_audit(
        connection, project_id=version.project_id, actor=actor, action=action, subject=version.name,
        before=before, after=after, reason=reason,
    )  # fmt: skip


async def _routes_with(connection: AsyncConnection, name: str) -> list[str]:
    found = []
    for row in (await connection.execute(select(tables.routes))).mappings():
        roles = [role for role in ("stable", "previous", "candidate") if row[role] == name]
        if any(variant["target"] == name and variant["weight"] > 0 for variant in row["variants"]):
            roles.append("a share of the traffic")
        if roles:
            found.append(f"route {row['name']} has it as {' and '.join(roles)}")
    return found


async def _jobs_with(connection: AsyncConnection, name: str) -> Iterable[str]:
    jobs = tables.jobs
    query = select(jobs.c.id, jobs.c.kind, jobs.c.spec).where(jobs.c.state.not_in(tables.FINAL_JOB_STATES))
    rows = (await connection.execute(query)).all()
    return [
        f"{row.kind} job {row.id} works with it"
        for row in rows
        if name in (row.spec.get("target"), row.spec.get("stable"), row.spec.get("model"))
    ]
