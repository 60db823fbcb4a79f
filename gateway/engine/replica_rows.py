"""SQL of a replica's row: a new start, and the failures before it."""

from __future__ import annotations

from sqlalchemy import delete, insert, update

from .. import tables
from ..database import Database, bump_revision
from ..ids import now
from ..registry.models import ReplicaState
from .failures import Failures
from .models import ReplicaSpec


async def begin_row(database: Database, spec: ReplicaSpec, epoch: str, failures: Failures) -> None:
    """A new process: whatever the tables say of the old one's adapters is wrong from now on."""
    table = tables.replicas
    async with database.write() as connection:
        await connection.execute(delete(tables.residency).where(tables.residency.c.replica_id == spec.id))
        await connection.execute(delete(table).where(table.c.id == spec.id))
        await connection.execute(
            insert(table).values(
                id=spec.id,
                state=ReplicaState.STARTING,
                reason=None,
                started_at=now(),
                socket=spec.socket,
                epoch=epoch,
                self_test="pending",
                revision=0,
                **_columns(failures),
            )
        )
        await bump_revision(connection)


async def note_failures(database: Database, spec: ReplicaSpec, epoch: str, failures: Failures) -> None:
    """Keep the count where everybody sees it. No gateway decides by it, so the revision stays."""
    table = tables.replicas
    async with database.write() as connection:
        mine = (table.c.id == spec.id) & (table.c.epoch == epoch)
        await connection.execute(update(table).where(mine).values(**_columns(failures)))


def _columns(failures: Failures) -> dict[str, object]:
    return {
        "failures": failures.in_a_row,
        "futile_starts": failures.futile_starts,
        "last_failure": failures.last,
    }
