"""What the data plane knows: one immutable snapshot of routes, versions, keys and replicas, replaced as a whole.

Requests read `RoutingTable.current` and nothing else, so an unreachable database stops no completion. The snapshot is
also kept on disk, whole and private, so that a gateway can start without its database.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import RowMapping, Select, select
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..database import Database, read_revision
from ..durable import put, remove_unfinished
from ..errors import GatewayError
from ..ids import now
from ..lease import lease_until
from ..names import engine_name, version_name
from .models import Trial
from .snapshot import Snapshot, SnapshotBase, SnapshotKey, SnapshotReplica, SnapshotRoute, SnapshotVersion

log = structlog.get_logger(__name__)

POLL_INTERVAL_S = 0.1
MAX_SNAPSHOT_BYTES = 64 * 2**20
MAX_SAVE_PAUSE_S = 30.0

_FORMAT = TypeAdapter(Snapshot)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What one look at the database found. Nothing is made of it before the database is let go."""

    revision: int
    routes: Sequence[RowMapping]
    versions: Sequence[RowMapping]
    replicas: Sequence[RowMapping]
    residency: Sequence[RowMapping]
    keys: Sequence[RowMapping]


async def _read_rows(connection: AsyncConnection) -> _Rows:
    """Everything, as of one revision: a connection of `Database.read` sees one state."""
    table, jobs, residency, keys = tables.adapter_versions, tables.jobs, tables.residency, tables.api_keys
    creator = jobs.c.created_by.label("job_creator")
    return _Rows(
        revision=await read_revision(connection),
        routes=await _all(connection, select(tables.routes)),
        versions=await _all(connection, select(table, creator).outerjoin(jobs, jobs.c.id == table.c.job_id)),
        replicas=await _all(connection, select(tables.replicas).order_by(tables.replicas.c.id)),
        residency=await _all(connection, select(residency).where(residency.c.state == "ready")),
        keys=await _all(connection, select(keys).where(keys.c.revoked_at.is_(None))),
    )


async def _all(connection: AsyncConnection, query: Select[Any]) -> Sequence[RowMapping]:
    found: Sequence[RowMapping] = (await connection.execute(query)).mappings().all()
    return found


def _built(rows: _Rows, bases: Mapping[str, SnapshotBase]) -> Snapshot:
    return Snapshot(
        revision=rows.revision,
        bases=dict(bases),
        routes={row["name"]: _route(row) for row in rows.routes},
        versions={version.name: version for version in map(_version, rows.versions)},
        replicas=_replicas(rows),
        keys={row["hash"]: _key(row) for row in rows.keys},
    )


def _route(row: RowMapping) -> SnapshotRoute:
    return SnapshotRoute(
        name=row["name"],
        revision=row["revision"],
        salt=row["salt"],
        stable=row["stable"],
        previous=row["previous"],
        candidate=row["candidate"],
        variants=tuple((variant["target"], int(variant["weight"])) for variant in row["variants"]),
        project_id=row["project_id"],
        updated_at=row["updated_at"],
        trial=Trial.model_validate(row["trial"]) if row["trial"] else None,
        last_action=row["last_move"]["action"] if row["last_move"] else "",
        gates=tuple(row["gates"]),
    )


def _version(row: RowMapping) -> SnapshotVersion:
    return SnapshotVersion(
        name=version_name(row["adapter"], row["version"]),
        adapter=row["adapter"],
        version=row["version"],
        digest=row["digest"],
        engine_name=engine_name(row["adapter"], row["version"], row["digest"]),
        state=row["state"],
        project_id=row["project_id"],
        owners=frozenset(owner for owner in (row["created_by"], row["job_creator"]) if owner),
        is_promoted=row["promoted_at"] is not None,
        is_rolled_back=row["rolled_back_at"] is not None,
        created_at=row["created_at"],
        base_model=row["base_model"],
        is_retired=row["retired_at"] is not None,
    )


def _replicas(rows: _Rows) -> tuple[SnapshotReplica, ...]:
    ready: dict[str, set[str]] = {}
    for row in rows.residency:
        ready.setdefault(row["replica_id"], set()).add(row["engine_name"])
    return tuple(
        SnapshotReplica(row["id"], row["socket"], row["epoch"], row["state"], frozenset(ready.get(row["id"], ())))
        for row in rows.replicas
    )


def _key(row: RowMapping) -> SnapshotKey:
    return SnapshotKey(row["id"], row["name"], row["project_id"], frozenset(row["scopes"]), row["expires_at"])


class RoutingTable:
    """The current snapshot, and the loop that keeps it current."""

    def __init__(self, database: Database, path: Path, bases: Mapping[str, SnapshotBase]) -> None:
        self._database = database
        self._path = path
        self._bases = dict(bases)
        self._lock = asyncio.Lock()
        self._listeners: list[Callable[[Snapshot], None]] = []
        self._overlay: Callable[[Snapshot], Snapshot] = lambda snapshot: snapshot
        self._without_overlay: Snapshot | None = None
        self._saved: Snapshot | None = None
        self._save_after = 0.0
        self._saves_failed_in_a_row = 0
        self._seen_at: float | None = None
        self.controller_until: datetime | None = None  # when the controller's lease runs out, as last seen
        self.current = Snapshot(revision=-1, bases=self._bases)
        self.failed_refreshes = 0
        self.failed_saves = 0
        self.refused_files = 0

    def on_change(self, listener: Callable[[Snapshot], None]) -> None:
        """Call `listener` with each new snapshot."""
        self._listeners.append(listener)

    def lay_over(self, overlay: Callable[[Snapshot], Snapshot]) -> None:
        """Let `overlay` change each snapshot before it counts."""
        self._overlay = overlay

    def lay_over_again(self) -> None:
        """The overlay says something else now."""
        if self._without_overlay is not None:
            self._install(self._without_overlay)

    @property
    def is_loaded(self) -> bool:
        """Whether there is a table at all, from the database or from disk."""
        return self.current.revision >= 0

    @property
    def age_s(self) -> float:
        """Time since the database last confirmed the table; infinite before it ever did."""
        return float("inf") if self._seen_at is None else time.monotonic() - self._seen_at

    async def refresh(self, *, anew: bool = False) -> Snapshot:
        """See every change that was committed before this call; `anew` also without one. Raises `Unavailable` when the database cannot tell."""
        async with self._lock:
            rows = None
            async with self._database.read() as connection:
                if anew or self._seen_at is None or await read_revision(connection) != self.current.revision:
                    rows = await _read_rows(connection)
                self.controller_until = await lease_until(connection)
            if rows is not None:
                self._install(_built(rows, self._bases))
            self._seen_at = time.monotonic()
            return self.current

    async def catch_up(self) -> None:
        """Before something is answered for: route by all that was committed until now, so that what the answer says holds
        for the next request. A database that cannot tell does not undo what was committed; the loop sees it later."""
        try:
            await self.refresh()
        except GatewayError as error:
            log.warning("this gateway sees what was committed a little later", error=error.message)

    async def run(self) -> None:
        """Follow the database until cancelled. Whatever goes wrong, the last good table serves on."""
        was_failing = False
        while True:
            try:
                await self.refresh()
                await self.save()
                was_failing = False
            except Exception as error:
                self.failed_refreshes += 1
                if not was_failing:
                    known = isinstance(error, GatewayError)
                    log.error(
                        "routing table is stale", error=str(error), revision=self.current.revision, exc_info=not known
                    )
                was_failing = True
            await asyncio.sleep(POLL_INTERVAL_S)

    def _install(self, snapshot: Snapshot) -> None:
        self._without_overlay = snapshot
        self.current = self._overlay(snapshot)
        for listener in self._listeners:
            listener(self.current)

    async def save(self) -> None:
        """Write the table to disk unless it is there. A failure is counted, told once, and tried again later, ever less often."""
        snapshot = self._without_overlay or self.current
        if snapshot is self._saved or time.monotonic() < self._save_after:
            return
        try:
            await asyncio.to_thread(save_snapshot, snapshot, self._path)
        except (OSError, ValueError) as error:
            self._note_failed_save(error)
            return
        if self._saves_failed_in_a_row:
            log.info("snapshot saved again", after_failures=self._saves_failed_in_a_row)
        self._saved, self._save_after, self._saves_failed_in_a_row = snapshot, 0.0, 0

    def _note_failed_save(self, error: Exception) -> None:
        self.failed_saves += 1
        if self._saves_failed_in_a_row == 0:
            log.error("snapshot not saved, the last good one stays", error=str(error), path=str(self._path))
        self._save_after = time.monotonic() + save_pause_s(self._saves_failed_in_a_row)
        self._saves_failed_in_a_row += 1

    def load_saved(self) -> bool:
        """Take the table that an earlier run left on disk; False when there is none that can be trusted."""
        try:
            saved = load_saved_snapshot(self._path)
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            self.refused_files += 1
            log.error("saved snapshot refused", error=str(error), path=str(self._path))
            return False
        # The base model is what this process was started with, whatever an earlier one served.
        self._install(replace(saved, bases=self._bases))
        self._saved = self._without_overlay
        return True


def save_snapshot(snapshot: Snapshot, path: Path) -> None:
    """Replace the file in one step, readable by this user only: it holds the hashes of keys."""
    content = _FORMAT.dump_json(snapshot)
    if len(content) > MAX_SNAPSHOT_BYTES:
        raise ValueError(f"the snapshot has {len(content)} bytes, more than {MAX_SNAPSHOT_BYTES}")
    put(path, content, mode=0o600)
    remove_unfinished(path)


def save_pause_s(failures: int) -> float:
    """Pause after a failed save that came after so many."""
    return min(MAX_SAVE_PAUSE_S, 0.5 * 2.0 ** min(failures, 16))


def load_saved_snapshot(path: Path) -> Snapshot:
    """Read and check a saved snapshot. `ValueError` when it is too large or not what was written."""
    size = path.stat().st_size
    if size > MAX_SNAPSHOT_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {MAX_SNAPSHOT_BYTES}")
    try:
        return _FORMAT.validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{path} is damaged: {error.error_count()} errors, first: {error.errors()[0]['msg']}"
        ) from error


def is_expired(key: SnapshotKey) -> bool:
    """Whether the key's time is over."""
    return key.expires_at is not None and key.expires_at <= now()
