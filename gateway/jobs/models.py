"""Jobs: heavy work in a process of its own. Fine-tuning, verification of a version, evaluation."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ..names import NAME_PATTERN


class JobKind(StrEnum):
    """What a job does."""

    FINE_TUNING = "fine_tuning"
    VERIFY = "verify"
    EVALUATION = "evaluation"


class JobState(StrEnum):
    """OpenAI's words, and `publishing`: trained, and on the way to being verified, loaded and probed."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    PUBLISHING = "publishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the job can still change."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class FineTuningSpec(BaseModel, frozen=True, extra="forbid"):
    """Train a new version of an adapter from uploaded files."""

    kind: Literal[JobKind.FINE_TUNING] = JobKind.FINE_TUNING
    model: str = Field(description="base model, or the version to train on from (`support@1`)")
    adapter: str = Field(pattern=NAME_PATTERN, description="adapter the version is published under")
    training_file: str
    validation_file: str | None = None
    recipe: str = "sft"
    preset: str | None = Field(default=None, description="shipped preset to start from; unset: the trainer's defaults")
    hyperparameters: dict[str, Any] = Field(
        default_factory=dict, description="overrides of the preset, by the trainer's names"
    )
    seed: int = 0
    suffix: str | None = None
    metadata: dict[str, str] = Field(default_factory=dict)


class VerifySpec(BaseModel, frozen=True, extra="forbid"):
    """Run a published version on its base before any engine sees it."""

    kind: Literal[JobKind.VERIFY] = JobKind.VERIFY
    target: str = Field(description="`support@1`")
    digest: str


class EvaluationSpec(BaseModel, frozen=True, extra="forbid"):
    """Run a suite on a version and on its baselines, and judge the difference."""

    kind: Literal[JobKind.EVALUATION] = JobKind.EVALUATION
    target: str = Field(description="`support@1`")
    digest: str
    suite: str
    suite_digest: str
    stable: str = Field(
        description="target the regression gate compares with: the route's stable when the job was made"
    )
    look: int = Field(default=1, ge=1, le=2, description="2: the one declared larger look after an inconclusive first")


JobSpec = Annotated[FineTuningSpec | VerifySpec | EvaluationSpec, Field(discriminator="kind")]


class Job(BaseModel, frozen=True):
    """One job and how far it is."""

    id: str
    kind: JobKind
    state: JobState
    spec: JobSpec
    result: dict[str, Any] | None = None
    error_code: str | None = None
    error_message: str | None = None
    attempt: int = 0
    cancel_requested: bool = False
    created_at: datetime
    created_by: str
    project_id: str
    started_at: datetime | None = None
    finished_at: datetime | None = None
    revision: int = 0


class JobEvent(BaseModel, frozen=True):
    """Something a job said; `metrics` events carry numbers in `data`."""

    id: str
    job_id: str
    at: datetime
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] | None = None


# ---- What crosses the Jobs seam: plain data only. -----------------------------------------------------------------


class ProcessState(StrEnum):
    """What a driver knows of a job's process."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


class ProcessSpec(BaseModel, frozen=True):
    """How a driver starts one attempt. `output` is the attempt's own directory."""

    job_id: str
    attempt: int
    argv: tuple[str, ...]
    env: dict[str, str]
    output: str
    timeout_s: float


class ProcessStatus(BaseModel, frozen=True):
    """What became of one attempt."""

    state: ProcessState
    exit_code: int | None = None


# ---- Files of an attempt's directory, written by the job's process, read by the controller. -------------------------
# spec.json      what to do (written by the controller before the start)
# progress.jsonl one `ProgressLine` a line, appended
# result.json    written last, by atomic rename; its `token` must be the attempt's


class ProgressLine(BaseModel, frozen=True):
    """One line of `progress.jsonl`."""

    at: datetime
    level: Literal["info", "warn", "error"] = "info"
    type: Literal["message", "metrics"] = "message"
    message: str
    data: dict[str, Any] | None = None


class JobResult(BaseModel, frozen=True):
    """`result.json`: how the attempt ended, in the job's own words."""

    token: str
    ok: bool
    error_code: str | None = None
    error_message: str | None = None
    data: dict[str, Any] = Field(default_factory=dict)
