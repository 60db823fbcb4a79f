"""The audit log: who changed what, when and why."""

from __future__ import annotations

from fastapi import APIRouter, Query
from pydantic import BaseModel
from sqlalchemy import and_, or_, select

from .. import tables
from ..database import Database
from ..errors import NotFound
from ..registry.models import AuditEntry
from .declared import DeclaredRoute
from .dependencies import Admin, DatabaseService

router = APIRouter(route_class=DeclaredRoute, prefix="/api/audit", tags=["audit"])

_MAX_PAGE = 1_000


class AuditPage(BaseModel, frozen=True):
    """Entries, newest first."""

    data: tuple[AuditEntry, ...]
    has_more: bool


@router.get("", summary="Read the audit log")
async def list_audit(
    caller: Admin,
    database: DatabaseService,
    subject: str | None = None,
    action: str | None = None,
    after: str | None = None,
    limit: int = Query(50, ge=1, le=_MAX_PAGE),
) -> AuditPage:
    """Entries of the key's project, newest first; those older than the entry `after`."""
    found = await read_audit(
        database, project_id=caller.project_id, subject=subject, action=action, after=after, limit=limit + 1
    )
    return AuditPage(data=found[:limit], has_more=len(found) > limit)


async def read_audit(
    database: Database, *, project_id: str, subject: str | None, action: str | None, after: str | None, limit: int
) -> tuple[AuditEntry, ...]:
    """Entries of a project, newest first."""
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
