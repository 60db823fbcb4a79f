"""Which rows grow without end, and what tells their age. One entry more covers one table more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Column, ColumnElement, Table, and_, select

from .. import tables
from ..jobs.launch import ACTOR
from ..jobs.models import JobKind
from ..jobs.service import ID_PREFIX
from ..jobs.store import FINAL_STATES
from ..settings import RetentionSettings


@dataclass(frozen=True)
class Kind:
    """Rows of one table that go when they are old enough. Never listed: versions, verdicts, routes, keys that people made."""

    name: str
    table: Table
    moment: Column[object]
    """What its age is told by; an index begins with it, or with the columns that `guard` compares."""
    days: Callable[[RetentionSettings], float]
    row_bytes: int
    """What one takes with its indexes; measured, and good for an estimate."""
    guard: ColumnElement[bool] | None = None
    """What must be so besides."""


_UNFINISHED = select(tables.jobs.c.id).where(tables.jobs.c.state.not_in(FINAL_STATES))

KINDS: tuple[Kind, ...] = (
    Kind(
        name="exposures",
        table=tables.exposures,
        moment=tables.exposures.c.at,
        days=lambda settings: settings.exposures_days,
        row_bytes=422,
    ),
    Kind(
        name="job_events",
        table=tables.job_events,
        moment=tables.job_events.c.at,
        days=lambda settings: settings.job_events_days,
        row_bytes=300,
        guard=tables.job_events.c.job_id.not_in(_UNFINISHED),
    ),
    Kind(
        name="job_attempts",
        table=tables.job_attempts,
        moment=tables.job_attempts.c.finished_at,
        days=lambda settings: settings.job_attempts_days,
        row_bytes=350,
        guard=tables.job_attempts.c.job_id.not_in(_UNFINISHED),
    ),
    Kind(
        name="evaluation_key_audit",
        table=tables.audit,
        moment=tables.audit.c.at,
        days=lambda settings: settings.evaluation_key_audit_days,
        row_bytes=450,
        guard=and_(
            tables.audit.c.actor == ACTOR,
            tables.audit.c.action.in_(("key.create", "key.revoke")),
            tables.audit.c.subject.like(f"{ID_PREFIX[JobKind.EVALUATION]}%"),
        ),
    ),
    Kind(
        name="deleted_files",
        table=tables.files,
        moment=tables.files.c.deleted_at,
        days=lambda settings: settings.deleted_files_days,
        row_bytes=400,
    ),
)
EXPOSURES, JOB_EVENTS = KINDS[0], KINDS[1]
