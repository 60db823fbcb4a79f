"""Jobs of every kind: what runs, how far it is, and stop."""

from __future__ import annotations

from fastapi import APIRouter, Query
from pydantic import BaseModel

from ..jobs.models import Job, JobEvent, JobKind
from .declared import DeclaredRoute
from .dependencies import JobsService, Trainer

router = APIRouter(route_class=DeclaredRoute, prefix="/api/jobs", tags=["jobs"])

_MAX_PAGE = 200
_MAX_EVENTS = 10_000


class JobPage(BaseModel, frozen=True):
    """Jobs, newest first."""

    data: tuple[Job, ...]
    has_more: bool


class EventPage(BaseModel, frozen=True):
    """Events, oldest first."""

    data: tuple[JobEvent, ...]
    has_more: bool


@router.get("", summary="List jobs")
async def list_jobs(
    caller: Trainer,
    jobs: JobsService,
    kind: JobKind | None = None,
    after: str | None = None,
    limit: int = Query(50, ge=1, le=_MAX_PAGE),
) -> JobPage:
    """Jobs of the key's project, without the reports of evaluations."""
    found = await jobs.list(principal=caller, kinds={kind} if kind else None, after=after, limit=limit + 1)
    return JobPage(data=tuple(without_report(job) for job in found[:limit]), has_more=len(found) > limit)


@router.get("/{job_id}", summary="Show a job")
async def get_job(job_id: str, caller: Trainer, jobs: JobsService) -> Job:
    """One job with its result."""
    return await jobs.get(job_id, principal=caller)


@router.get("/{job_id}/events", summary="Show what a job said")
async def list_events(
    job_id: str,
    caller: Trainer,
    jobs: JobsService,
    after: str | None = None,
    limit: int = Query(1_000, ge=1, le=_MAX_EVENTS),
) -> EventPage:
    """Events in the order they happened: those that follow `after`, or else the latest."""
    newest_first = after is None
    found = await jobs.events(job_id, principal=caller, after=after, limit=limit + 1, newest_first=newest_first)
    page = found[:limit][::-1] if newest_first else found[:limit]
    return EventPage(data=page, has_more=len(found) > limit)


@router.post("/{job_id}/cancel", summary="Cancel a job")
async def cancel_job(job_id: str, caller: Trainer, jobs: JobsService) -> Job:
    """Ask a job to stop; its process is ended by the controller."""
    return await jobs.cancel(job_id, principal=caller)


def without_report(job: Job) -> Job:
    """For lists: reports are long."""
    if not job.result or "report" not in job.result:
        return job
    return job.model_copy(update={"result": {key: value for key, value in job.result.items() if key != "report"}})
