"""Suites and evaluations: is a version better than its baselines, and did it forget anything?"""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, Field

from ..jobs.models import Job, JobKind
from ..jobs.suites import Suite
from .declared import DeclaredRoute
from .dependencies import Caller, JobsService, SuitesService, Trainer
from .jobs import JobPage, without_report

router = APIRouter(route_class=DeclaredRoute, prefix="/api", tags=["evaluations"])

_MAX_PAGE = 200


class EvaluationRequest(BaseModel, frozen=True, extra="forbid"):
    """Which version, on which suite."""

    target: str = Field(description="a version, such as support@1")
    suite: str = Field(description="name of a suite that this server's owner registered, or that ships with it")
    larger_look: bool = Field(default=False, description="the one larger look that an inconclusive first one allows")


class SuiteList(BaseModel, frozen=True):
    """Every suite."""

    data: tuple[Suite, ...]


@router.get("/suites", summary="List suites")
async def list_suites(caller: Caller, suites: SuitesService) -> SuiteList:
    """Suites that evaluations and gates may name. They are registered with `turnout suite add`, never over HTTP."""
    return SuiteList(data=await asyncio.to_thread(suites.list))


@router.post("/evaluations", status_code=201, summary="Start an evaluation")
async def create_evaluation(
    request: EvaluationRequest,
    response: Response,
    caller: Trainer,
    jobs: JobsService,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Job:
    """Run a suite on a version. 200 with the earlier job when a verdict stands already, or one is on its way."""
    job, created = await jobs.create_evaluation(
        request.target,
        request.suite,
        principal=caller,
        larger_look=request.larger_look,
        idempotency_key=idempotency_key,
    )
    response.status_code = 201 if created else 200
    return job


@router.get("/evaluations", summary="List evaluations")
async def list_evaluations(
    caller: Trainer,
    jobs: JobsService,
    target: str | None = None,
    after: str | None = None,
    limit: int = Query(50, ge=1, le=_MAX_PAGE),
) -> JobPage:
    """Evaluations, newest first, without their reports; perhaps of one version."""
    found = await jobs.list(principal=caller, kinds={JobKind.EVALUATION}, target=target, after=after, limit=limit + 1)
    return JobPage(data=tuple(without_report(job) for job in found[:limit]), has_more=len(found) > limit)


@router.get("/evaluations/{job_id}", summary="Show an evaluation")
async def get_evaluation(job_id: str, caller: Trainer, jobs: JobsService) -> Job:
    """One evaluation with its verdict and report."""
    return await jobs.get(job_id, principal=caller, kind=JobKind.EVALUATION)
