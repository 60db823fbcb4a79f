"""What a server says, as the client sees it. Only `gateway.client` builds these."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Something the server said. Fields of a newer server are kept, not refused."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())


class Residency(Answer):
    """One version on one replica of the engine."""

    replica_id: str
    state: str
    code: str | None = None
    reason: str | None = None


class Verdict(Answer):
    """The outcome of a gate for one digest."""

    suite: str
    verdict: str
    reason: str = ""
    baseline: str | None = None
    looks: int | None = None
    job_id: str | None = None


class Version(Answer):
    """One immutable version of an adapter, where it is loaded and what its gates said."""

    full_name: str  # support@3
    adapter: str
    version: int
    digest: str
    base_model: str
    rank: int
    size_bytes: int
    state: str
    state_code: str | None = None
    state_reason: str | None = None
    parent: str | None = None
    job_id: str | None = None
    promoted_at: datetime | None = None
    rolled_back_at: datetime | None = None
    retired_at: datetime | None = None
    used_at: datetime | None = None
    created_at: datetime
    created_by: str
    residency: tuple[Residency, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    manifest: dict[str, Any] | None = None

    @property
    def standing(self) -> str:
        """Its state, or that it is retired, whatever it was before."""
        return "retired" if self.retired_at is not None else self.state

    @property
    def is_resident(self) -> bool:
        """Whether some replica answers with it at once."""
        return any(place.state == "ready" for place in self.residency)


class Readiness(Answer):
    """Whether completions are served, and who looks after the engines."""

    status: str
    reason: str | None = None
    database: str = "ok"
    engines_ready: int = 0
    controller: str = "ok"
    controller_silent_s: float | None = None


class Adapter(Answer):
    """A named fine-tune and its versions, oldest first."""

    name: str
    created_at: datetime
    created_by: str
    versions: tuple[Version, ...] = ()


class Variant(Answer):
    """One arm of a route."""

    target: str
    weight: int


class Trial(Answer):
    """What a route is trying."""

    arms: tuple[str, ...]
    against: str
    since_revision: int


class LastMove(Answer):
    """How a route's traffic came to be where it is."""

    action: str
    moved_from: str
    moved_to: str
    revision: int
    at: datetime
    by: str


class Route(Answer):
    """Where a name's traffic goes."""

    name: str
    revision: int
    stable: str
    previous: str
    candidate: str | None = None
    variants: tuple[Variant, ...]
    trial: Trial | None = None
    last_move: LastMove | None = None
    gates: tuple[str, ...] = ()
    updated_at: datetime
    updated_by: str


class RouteMoved(Route):
    """A route as a split left it, and as it was before."""

    before: Route | None = None  # None: from a server that does not say it
    repeated: bool = False
    dry_run: bool = False


class Moved(Answer):
    """A promotion or rollback that took place, or would."""

    before: Route | None = None  # None: from a server that does not say it
    route: Route
    moved_from: str
    moved_to: str
    revision: int
    took_ms: float
    needs_load: bool = False
    marked: tuple[str, ...] = ()
    answers_cut: int = 0
    repeated: bool = False
    dry_run: bool = False
    journalled: bool = False


class Job(Answer):
    """A fine-tuning, verification or evaluation job."""

    id: str
    kind: str
    state: str
    spec: dict[str, Any] = Field(default_factory=dict)
    result: dict[str, Any] | None = None
    error_code: str | None = None
    error_message: str | None = None
    attempt: int = 0
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def is_final(self) -> bool:
        """Whether it can still change."""
        return self.state in ("succeeded", "failed", "cancelled")


class JobEvent(Answer):
    """A line that a job said."""

    id: str
    at: datetime
    level: str
    message: str
    data: dict[str, Any] | None = None


class Suite(Answer):
    """A set of tasks that a version can be evaluated on."""

    name: str
    digest: str


class Key(Answer):
    """An API key, without its secret."""

    id: str
    name: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class NewKey(Answer):
    """A key that was just made; `key` is its secret and is never shown again."""

    id: str
    name: str
    scopes: tuple[str, ...]
    key: str


class AuditEntry(Answer):
    """Who changed what, when and why."""

    at: datetime
    actor: str
    action: str
    subject: str
    before: Any = None
    after: Any = None
    reason: str | None = None


class Replica(Answer):
    """One copy of the engine."""

    id: str
    state: str
    reason: str | None = None
    self_test: str | None = None
    batch_noise: float | None = None  # nats by which batches alone move the base model's answers
    started_at: datetime | None = None
    failures: int = 0  # in a row, since it last served for a while
    futile_starts: int = 0  # starts in a row that ended before it served, with no adapter to blame
    last_failure: str | None = None
    ready_adapters: tuple[str, ...] = ()


class Completion(Answer):
    """An answer to one chat, and which weights gave it."""

    text: str
    route: str
    variant: str
    version: str
    digest: str
    request_id: str
    usage: dict[str, Any] | None = None


class Collected(Answer):
    """One kind of what is over."""

    kind: str
    unit: str
    count: int
    is_more: bool = False
    size_bytes: int
    oldest: datetime | None = None


class GcReport(Answer):
    """What is over, or what went."""

    dry_run: bool
    is_complete: bool = True
    kinds: tuple[Collected, ...] = ()
    notes: tuple[str, ...] = ()
