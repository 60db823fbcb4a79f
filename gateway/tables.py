"""Every table of the state. Alembic's migrations are checked against these by a test."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UTCDateTime(TypeDecorator[datetime]):
    """Aware UTC timestamps on every database; a naive one is a bug and is refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times; store UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive timestamp {value!r}")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """SQLite forgets the zone: give it back."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _owned() -> list[Column[object]]:
    return [
        Column("project_id", String(40), nullable=False, index=True),
        Column("created_at", UTCDateTime, nullable=False),
        Column("created_by", String(80), nullable=False),
    ]


api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(40), primary_key=True),
    *_owned(),
    Column("name", String(80), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("expires_at", UTCDateTime),
    Column("revoked_at", UTCDateTime),
)

audit = Table(
    "audit",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project_id", String(40), nullable=False, index=True),
    Column("at", UTCDateTime, nullable=False, index=True),
    Column("actor", String(80), nullable=False),
    Column("action", String(40), nullable=False),
    Column("subject", String(120), nullable=False, index=True),
    Column("before", JSON),
    Column("after", JSON),
    Column("reason", Text),
    Index("ix_audit_actor_action_at", "actor", "action", "at"),
)

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(48), primary_key=True),
    *_owned(),
)

adapter_versions = Table(
    "adapter_versions",
    metadata,
    Column("id", String(40), primary_key=True),
    *_owned(),
    Column("adapter", String(48), nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String(64), nullable=False, index=True),
    Column("manifest_digest", String(64), nullable=False),
    Column("base_model", String(48), nullable=False),
    Column("base_digest", String(64), nullable=False),
    Column("rank", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("parent", String(64)),
    Column("job_id", String(40)),
    Column("state", String(16), nullable=False),
    Column("state_code", String(40)),
    Column("state_reason", Text),
    Column("promoted_at", UTCDateTime),
    Column("rolled_back_at", UTCDateTime),
    Column("gated_at", UTCDateTime),  # when it became stable by passed gates; never by force
    Column("retired_at", UTCDateTime),
    Column("used_at", UTCDateTime),  # written behind the requests; moves no revision
    UniqueConstraint("adapter", "version", name="uq_adapter_versions_adapter_version"),
    UniqueConstraint("adapter", "digest", name="uq_adapter_versions_adapter_digest"),
)

routes = Table(
    "routes",
    metadata,
    Column("name", String(48), primary_key=True),
    *_owned(),
    Column("revision", Integer, nullable=False),
    Column("salt", String(64), nullable=False),
    Column("stable", String(64), nullable=False),
    Column("previous", String(64), nullable=False),
    Column("candidate", String(64)),
    Column("variants", JSON, nullable=False),
    Column("trial", JSON(none_as_null=True)),
    Column("last_move", JSON(none_as_null=True)),
    Column("gates", JSON, nullable=False),
    Column("updated_at", UTCDateTime, nullable=False),
    Column("updated_by", String(80), nullable=False),
)

# Answers of moves, kept for a day: a call that is repeated gets the first one's and moves nothing.
moves = Table(
    "moves",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("project_id", String(40), nullable=False, index=True),
    Column("at", UTCDateTime, nullable=False, index=True),
    Column("actor", String(80), nullable=False),
    Column("route", String(48), nullable=False),
    Column("revision", Integer, nullable=False),  # what the move was decided on
    Column("asked", String(64), nullable=False),  # sha256 of the action and what it was asked to do
    Column("idempotency_key", String(128)),
    Column("answer", JSON, nullable=False),
    UniqueConstraint("project_id", "idempotency_key", name="uq_moves_project_id_idempotency_key"),
    Index("ix_moves_route_revision", "route", "revision"),
)

files = Table(
    "files",
    metadata,
    Column("id", String(40), primary_key=True),
    *_owned(),
    Column("filename", String(255), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("deleted_at", UTCDateTime),
)

# States that a job never leaves; `jobs.models.JobState` has all of them.
FINAL_JOB_STATES = ("succeeded", "failed", "cancelled")

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(40), primary_key=True),
    *_owned(),
    Column("kind", String(16), nullable=False, index=True),
    Column("state", String(20), nullable=False, index=True),
    Column("spec", JSON, nullable=False),
    Column("result", JSON),
    Column("error_code", String(60)),
    Column("error_message", Text),
    Column("attempt", Integer, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("started_at", UTCDateTime),
    Column("finished_at", UTCDateTime),
    Column("revision", Integer, nullable=False),
)

job_attempts = Table(
    "job_attempts",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("token_hash", String(64), nullable=False),
    Column("started_at", UTCDateTime, nullable=False),
    Column("heartbeat_at", UTCDateTime, nullable=False),
    Column("finished_at", UTCDateTime, index=True),
    Column("progress_offset", BigInteger, nullable=False),
    Column("outcome", String(20)),
)

job_events = Table(
    "job_events",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("job_id", String(40), nullable=False, index=True),
    Column("at", UTCDateTime, nullable=False, index=True),
    Column("level", String(10), nullable=False),
    Column("type", String(20), nullable=False),
    Column("message", Text, nullable=False, info={"most": 4_000}),  # characters
    Column("data", JSON, info={"most": 16_000}),
)

verdicts = Table(
    "verdicts",
    metadata,
    Column("id", String(40), primary_key=True),
    *_owned(),
    Column("digest", String(64), nullable=False),
    Column("suite", String(80), nullable=False),
    Column("suite_digest", String(64), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("baseline", String(64), nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("job_id", String(40), nullable=False),  # whose result holds the report
    Column("looks", Integer, nullable=False),
    UniqueConstraint(
        "project_id", "digest", "suite_digest", "fingerprint", "baseline", name="uq_verdicts_project_digest"
    ),
)

replicas = Table(
    "replicas",
    metadata,
    Column("id", String(40), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", Text),
    Column("started_at", UTCDateTime),
    Column("socket", String(255), nullable=False),
    Column("epoch", String(40), nullable=False),
    Column("self_test", String(16), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("failures", Integer, nullable=False, server_default="0"),  # in a row, since it last served for a while
    # Starts in a row that ended before it served, and for which no adapter was to blame.
    Column("futile_starts", Integer, nullable=False, server_default="0"),
    Column("last_failure", Text),  # stays while it starts again
    Column("batch_noise", Float),  # nats between base alone and base in company of base; None: not measured
)

residency = Table(
    "residency",
    metadata,
    Column("replica_id", String(40), primary_key=True),
    Column("engine_name", String(96), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("code", String(40)),
    Column("reason", Text),
    Column("updated_at", UTCDateTime, nullable=False),
)

processes = Table(
    "processes",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", Float, nullable=False),
    Column("argv_digest", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("holder", String(80), nullable=False),
    Column("expires_at", UTCDateTime, nullable=False),
    Column("epoch", Integer, nullable=False),
)

revisions = Table(
    "revisions",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

exposures = Table(
    "exposures",
    metadata,
    Column("request_id", String(40), primary_key=True),
    Column("project_id", String(40), nullable=False),
    Column("at", UTCDateTime, nullable=False, index=True),
    Column("route", String(48), nullable=False),
    Column("variant", String(64), nullable=False),
    Column("version", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("unit", String(64), nullable=False),
    Column("replica_id", String(40), nullable=False),
    Column("status", Integer, nullable=False),
    Column("finish_reason", String(20)),
    Column("latency_s", Float, nullable=False),
    Column("first_token_s", Float),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Index("ix_exposures_route_at", "route", "at"),
)
