"""Adapters, their immutable versions, and where a version stands."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, Field

from ..names import NAME_PATTERN, engine_name, version_name

DIGEST_PATTERN = r"^[0-9a-f]{64}$"


class VersionState(StrEnum):
    """Where a version stands on its way to traffic; a later state is never left for an earlier one."""

    RECEIVED = "received"  # bytes are safe on disk and passed pre-flight
    VERIFIED = "verified"  # ran on its base: finite, different, sane
    REJECTED = "rejected"  # verify refused it, for good
    QUARANTINED = "quarantined"  # an engine or its probe refused it


class AdapterVersion(BaseModel, frozen=True):
    """One published, immutable set of LoRA weights."""

    id: str
    adapter: str = Field(pattern=NAME_PATTERN)
    version: int = Field(ge=1)
    base_model: str
    base_digest: str = Field(pattern=DIGEST_PATTERN, description="family digest of the base model")
    rank: int = Field(ge=1, le=512)
    digest: str = Field(pattern=DIGEST_PATTERN, description="sha256 over canonical config and weights")
    manifest_digest: str = Field(pattern=DIGEST_PATTERN)
    size_bytes: int
    parent: str | None = Field(
        default=None, description="name of the version it was trained on from, such as support@1"
    )
    job_id: str | None = None
    state: VersionState
    state_code: str | None = Field(default=None, description="reason code of a rejection or quarantine")
    state_reason: str | None = None
    promoted_at: datetime | None = Field(default=None, description="when it first became stable")
    gated_at: datetime | None = Field(default=None, description="when it became stable by passed gates; never by force")
    rolled_back_at: datetime | None = Field(default=None, description="when a rollback took it back")
    retired_at: datetime | None = Field(
        default=None, description="since when no engine loads it; its bytes may be gone"
    )
    used_at: datetime | None = Field(default=None, description="when it last answered a request, to a few seconds")
    created_at: datetime
    created_by: str
    project_id: str

    @property
    def is_servable(self) -> bool:
        """Whether engines may load it."""
        return self.state is VersionState.VERIFIED and self.retired_at is None

    @property
    def name(self) -> str:
        """What people and requests call it: `support@3`."""
        return version_name(self.adapter, self.version)

    @property
    def engine_name(self) -> str:
        """The name that engines serve it under; never reused for other weights."""
        return engine_name(self.adapter, self.version, self.digest)


class Adapter(BaseModel, frozen=True):
    """A named fine-tune and its versions, oldest first."""

    name: str
    created_at: datetime
    created_by: str
    versions: tuple[AdapterVersion, ...] = ()


class ReplicaState(StrEnum):
    """Whether an engine replica may take traffic."""

    STARTING = "starting"
    TESTING = "testing"  # healthy; self-test and adapters not done
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class ResidencyState(StrEnum):
    """One version on one replica."""

    LOADING = "loading"
    PROBING = "probing"
    READY = "ready"
    WAITING = "waiting"  # failed a moment ago; tried again after a pause
    QUARANTINED = "quarantined"
    REFUSED = "refused"  # for want of room or of whole files, not for a fault of its own
