"""The audit log, as keys of its project may read it."""

from __future__ import annotations

from fastapi import APIRouter, Query
from pydantic import BaseModel

from ..audit import AuditEntry, read_audit
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
