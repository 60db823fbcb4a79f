"""What a request is decided on, as of one revision: routes, versions, keys and replicas. Pure: a value, never changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from .models import Trial


@dataclass(frozen=True, slots=True)
class SnapshotBase:
    """The served base model."""

    name: str
    digest: str
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True)
class SnapshotVersion:
    """One adapter version, as far as requests care."""

    name: str
    adapter: str
    version: int
    digest: str
    engine_name: str
    state: str
    project_id: str
    owners: frozenset[str]
    is_promoted: bool
    is_rolled_back: bool
    created_at: datetime
    is_retired: bool = False
    base_model: str = ""  # of a table that an earlier release saved


@dataclass(frozen=True, slots=True)
class SnapshotRoute:
    """One route, as far as requests care."""

    name: str
    revision: int
    salt: str
    stable: str
    previous: str
    candidate: str | None
    variants: tuple[tuple[str, int], ...]
    project_id: str
    updated_at: datetime
    trial: Trial | None = None
    last_action: str = ""  # by which traffic came to be where it is
    gates: tuple[str, ...] = ()

    @property
    def tried(self) -> tuple[str, ...]:
        """Arms that a rollback would take back."""
        return self.trial.arms if self.trial is not None else ()


@dataclass(frozen=True, slots=True)
class SnapshotReplica:
    """One engine replica and the adapters that are READY on it."""

    id: str
    socket: str
    epoch: str
    state: str
    ready: frozenset[str]


@dataclass(frozen=True, slots=True)
class SnapshotKey:
    """A live API key."""

    id: str
    name: str
    project_id: str
    scopes: frozenset[str]
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a request is decided on, as of one revision."""

    revision: int
    bases: dict[str, SnapshotBase] = field(default_factory=dict)
    routes: dict[str, SnapshotRoute] = field(default_factory=dict)
    versions: dict[str, SnapshotVersion] = field(default_factory=dict)
    replicas: tuple[SnapshotReplica, ...] = ()
    keys: dict[str, SnapshotKey] = field(default_factory=dict)

    def serving(self, engine_name: str | None) -> list[SnapshotReplica]:
        """Replicas that may answer now with this adapter; None asks for the base model."""
        return [
            replica
            for replica in self.replicas
            if replica.state == "ready" and (engine_name is None or engine_name in replica.ready)
        ]
