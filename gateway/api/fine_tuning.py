"""OpenAI's fine-tuning API, plus one object of our own, `x_turnout`, for what OpenAI has no words for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, Field

from ..errors import Invalid
from ..jobs.models import FineTuningSpec, Job, JobEvent, JobKind, JobState
from ..jobs.training import Hyperparameters, Overrides, check_request
from .declared import DeclaredRoute
from .dependencies import CurrentSettings, JobsService, Trainer

router = APIRouter(route_class=DeclaredRoute, prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

_MAX_PAGE = 100
# OpenAI has fewer words: publishing is work, a paused job waits.
_STATUS = {JobState.PUBLISHING: "running", JobState.PAUSED: "queued"}
_PARAM_OF_CODE = {"invalid_training_file": "training_file", "invalid_validation_file": "validation_file"}

_MetadataKey = Annotated[str, Field(max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]


class Supervised(BaseModel, frozen=True, extra="forbid"):
    """Options of supervised fine-tuning."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(BaseModel, frozen=True, extra="forbid"):
    """How to train. Only supervised fine-tuning is offered."""

    type: Literal["supervised"] = "supervised"
    supervised: Supervised = Supervised()


class TurnoutOptions(BaseModel, frozen=True, extra="forbid"):
    """Sent with `extra_body={"x_turnout": {...}}`."""

    preset: str | None = Field(default=None, description="name of a shipped preset")
    overrides: Overrides = Overrides()


class FineTuningRequest(BaseModel, frozen=True, extra="forbid"):
    """OpenAI's request. A field that cannot be honoured is refused, never ignored."""

    model: str = Field(max_length=100, description="the base model, or a version to train on from, such as support@1")
    training_file: str = Field(max_length=100, description="id of an uploaded file with chat JSONL")
    validation_file: str | None = Field(default=None, max_length=100)
    suffix: str | None = Field(
        default=None, max_length=64, description="names the adapter; default: ft- and a short id"
    )
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(default=None, description="the older place of method's")
    integrations: tuple[()] | None = Field(default=None, description="none are offered")
    metadata: dict[_MetadataKey, _MetadataValue] | None = Field(default=None, max_length=16)
    x_turnout: TurnoutOptions = TurnoutOptions()


class JobError(BaseModel, frozen=True):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class FineTuningJob(BaseModel, frozen=True):
    """A job as OpenAI's SDK knows it."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    training_file: str
    validation_file: str | None
    hyperparameters: Hyperparameters
    method: Method
    trained_tokens: int | None
    result_files: tuple[str, ...] = ()
    error: JobError | None
    seed: int
    estimated_finish: None = None
    integrations: tuple[str, ...] = ()
    metadata: dict[str, str]


class FineTuningJobList(BaseModel, frozen=True):
    """One page of jobs, newest first."""

    object: Literal["list"] = "list"
    data: tuple[FineTuningJob, ...]
    has_more: bool


class FineTuningEvent(BaseModel, frozen=True):
    """An event as OpenAI's SDK knows it."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class FineTuningEventList(BaseModel, frozen=True):
    """One page of events, newest first."""

    object: Literal["list"] = "list"
    data: tuple[FineTuningEvent, ...]
    has_more: bool


@router.post("", summary="Start a fine-tuning job")
async def create_job(
    request: FineTuningRequest,
    caller: Trainer,
    jobs: JobsService,
    settings: CurrentSettings,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> FineTuningJob:
    """Train an adapter on uploaded rows and publish it; when the job has succeeded, `fine_tuned_model` answers."""
    options = request.x_turnout
    job, _ = await jobs.create_fine_tuning(
        principal=caller,
        model=request.model,
        training_file=request.training_file,
        validation_file=request.validation_file,
        suffix=request.suffix,
        preset=options.preset,
        hyperparameters=check_request(
            _hyperparameters(request),
            options.overrides,
            preset=options.preset,
            has_validation=request.validation_file is not None,
            max_rank=settings.engine.max_lora_rank,
        ),
        seed=request.seed,
        metadata=request.metadata,
        idempotency_key=idempotency_key,
    )
    return fine_tuning_job(job)


@router.get("", summary="List fine-tuning jobs")
async def list_jobs(
    caller: Trainer, jobs: JobsService, after: str | None = None, limit: int = Query(20, ge=1, le=_MAX_PAGE)
) -> FineTuningJobList:
    """Jobs of the key's project, newest first."""
    found = await jobs.list(principal=caller, kinds={JobKind.FINE_TUNING}, after=after, limit=limit + 1)
    return FineTuningJobList(data=tuple(fine_tuning_job(job) for job in found[:limit]), has_more=len(found) > limit)


@router.get("/{job_id}", summary="Show a fine-tuning job")
async def get_job(job_id: str, caller: Trainer, jobs: JobsService) -> FineTuningJob:
    """How far a job is."""
    return fine_tuning_job(await jobs.get(job_id, principal=caller, kind=JobKind.FINE_TUNING))


@router.post("/{job_id}/cancel", summary="Cancel a fine-tuning job")
async def cancel_job(job_id: str, caller: Trainer, jobs: JobsService) -> FineTuningJob:
    """Stop a job."""
    return fine_tuning_job(await jobs.cancel(job_id, principal=caller, kind=JobKind.FINE_TUNING))


@router.get("/{job_id}/events", summary="Show what a fine-tuning job said")
async def list_events(
    job_id: str,
    caller: Trainer,
    jobs: JobsService,
    after: str | None = None,
    limit: int = Query(20, ge=1, le=_MAX_PAGE),
) -> FineTuningEventList:
    """Events of a job, newest first."""
    await jobs.get(job_id, principal=caller, kind=JobKind.FINE_TUNING)
    found = await jobs.events(job_id, principal=caller, after=after, limit=limit + 1)
    return FineTuningEventList(data=tuple(_event(event) for event in found[:limit]), has_more=len(found) > limit)


def fine_tuning_job(job: Job) -> FineTuningJob:
    """A job in OpenAI's words."""
    spec = job.spec
    assert isinstance(spec, FineTuningSpec)  # noqa: S101  (asked for by kind)
    known = {name: value for name, value in spec.hyperparameters.items() if name in Hyperparameters.model_fields}
    hyperparameters = Hyperparameters.model_validate(known)
    result = job.result or {}
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created_at.timestamp()),
        finished_at=int(job.finished_at.timestamp()) if job.finished_at else None,
        model=spec.model,
        fine_tuned_model=result.get("fine_tuned_model") if job.state is JobState.SUCCEEDED else None,
        organization_id=job.project_id,
        status=_STATUS.get(job.state, str(job.state)),
        training_file=spec.training_file,
        validation_file=spec.validation_file,
        hyperparameters=hyperparameters,
        method=Method(supervised=Supervised(hyperparameters=hyperparameters)),
        trained_tokens=result.get("trained_tokens"),
        error=_error(job),
        seed=spec.seed,
        metadata=spec.metadata,
    )


def _hyperparameters(request: FineTuningRequest) -> Hyperparameters:
    if request.method is None:
        return request.hyperparameters or Hyperparameters()
    named = request.method.supervised.hyperparameters
    if request.hyperparameters is not None and request.hyperparameters != named:
        text = "`hyperparameters` and `method.supervised.hyperparameters` differ; send only the second"
        raise Invalid(text, code="twice_set", param="hyperparameters")
    return named


def _error(job: Job) -> JobError | None:
    if job.state is not JobState.FAILED:
        return None
    code = job.error_code or "failed"
    return JobError(code=code, message=job.error_message or "the job failed", param=_PARAM_OF_CODE.get(code))


def _event(event: JobEvent) -> FineTuningEvent:
    return FineTuningEvent(
        id=event.id,
        created_at=int(event.at.timestamp()),
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
    )
