"""What is over: show it, or remove it now."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from ..audit import record_audit
from ..retention.models import GcReport
from .declared import DeclaredRoute
from .dependencies import Admin, DatabaseService, RetentionService

router = APIRouter(route_class=DeclaredRoute, prefix="/api/gc", tags=["retention"])

_WITHIN_S = 20.0  # no client waits for a backlog of days; the controller goes on with it


class GcRequest(BaseModel, frozen=True, extra="forbid"):
    """Whether to remove anything."""

    dry_run: bool = Field(default=True, description="only say what would go")


@router.post("", summary="Remove what is over")
async def collect(
    request: GcRequest, caller: Admin, retention: RetentionService, database: DatabaseService
) -> GcReport:
    """Rows and files past their retention, of every project; by `dry_run` only counted. What went is in the audit log."""
    if request.dry_run:
        return await retention.survey()
    report = await retention.sweep(within_s=_WITHIN_S)
    if not report.is_empty:
        async with database.write() as connection:
            await record_audit(
                connection,
                project_id=caller.project_id,
                actor=caller.actor,
                action="gc",
                subject="retention",
                after={kind.kind: {"count": kind.count, "size_bytes": kind.size_bytes} for kind in report.kinds},
            )
    return report
