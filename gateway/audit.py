"""The audit log: who changed what, when and why. It is written and read here; only retention deletes from it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel
from sqlalchemy import and_, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from . import tables
from .database import Database
from .errors import NotFound
from .fitting import fit
from .ids import new_id, now


class AuditEntry(BaseModel, frozen=True):
    """Who changed what, when and why. Never altered, never deleted."""

    id: str
    at: datetime
    actor: str
    action: str
    subject: str
    before: Any = None
    after: Any = None
    reason: str | None = None


async def record_audit(
    connection: AsyncConnection,
    *,
    project_id: str,
    actor: str,
    action: str,
    subject: str,
    before: Any = None,
    after: Any = None,
    reason: str | None = None,
) -> None:
    """Append to the audit log, in the caller's transaction."""
    await connection.execute(
        insert(tables.audit).values(
            id=new_id("audit-"),
            project_id=project_id,
            at=now(),
            actor=actor,
            action=action,
            **fit(tables.audit, {"subject": subject, "before": before, "after": after, "reason": reason}),
        )
    )


async def read_audit(
    database: Database, *, project_id: str, subject: str | None, action: str | None, after: str | None, limit: int
) -> tuple[AuditEntry, ...]:
    """Entries of a project, newest first; those older than the entry `after`. Raises `NotFound` when there is none such."""
    table = tables.audit
    mine = select(table).where(table.c.project_id == project_id)
    query = mine.order_by(table.c.at.desc(), table.c.id.desc()).limit(limit)
    if subject is not None:
        query = query.where(table.c.subject == subject)
    if action is not None:
        query = query.where(table.c.action == action)
    async with database.read() as connection:
        if after is not None:
            last = (await connection.execute(mine.where(table.c.id == after))).one_or_none()
            if last is None:
                raise NotFound(f"the audit log has no entry {after[:60]!r}", code="audit_not_found", param="after")
            query = query.where(or_(table.c.at < last.at, and_(table.c.at == last.at, table.c.id < last.id)))
        rows = (await connection.execute(query)).mappings().all()
    return tuple(AuditEntry.model_validate({name: row[name] for name in AuditEntry.model_fields}) for row in rows)


async def latest_changes(
    connection: AsyncConnection, *, project_id: str, action: str, subject: str, limit: int
) -> tuple[Any, ...]:
    """What the newest entries say that things were `after` them, newest first."""
    table = tables.audit
    query = select(table.c.after).where(
        table.c.project_id == project_id, table.c.action == action, table.c.subject == subject
    )
    found = await connection.execute(query.order_by(table.c.at.desc(), table.c.id.desc()).limit(limit))
    return tuple(found.scalars())
