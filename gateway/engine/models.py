"""Engine replicas as data: how one is started, what is seen of it, what is wanted on it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from ..registry.models import AdapterVersion, ResidencyState


class ReplicaSpec(BaseModel, frozen=True):
    """How a fleet starts one replica. Plain data: it crosses the seam to other drivers."""

    id: str
    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    socket: str
    log: str


class ReplicaUsage(BaseModel, frozen=True):
    """What a replica's processes, all of them together, have used since they started."""

    at_s: float  # monotonic, of the one that looked
    cpu_s: float
    waited_s: float | None  # ready to run, without a core; None where the kernel does not tell
    read_bytes: int


class ReplicaProcess(BaseModel, frozen=True):
    """What a fleet knows of a replica. `epoch` names one start of its process: another epoch has no adapters."""

    id: str
    state: Literal["running", "exited", "absent"]
    epoch: str = ""
    exit_code: int | None = None
    usage: ReplicaUsage | None = None  # None where a driver cannot tell


class Wanted(BaseModel, frozen=True):
    """One version that should be resident, and where its files are."""

    version: AdapterVersion
    directory: str
    is_needed: bool = False  # a route serves it, or a rollback would

    @property
    def engine_name(self) -> str:
        """The name that engines serve it under."""
        return self.version.engine_name


class Resident(BaseModel, frozen=True):
    """One row of residency."""

    engine_name: str
    state: ResidencyState
    code: str | None = None
    reason: str | None = None
