"""Verdicts: stored once and final. Running a suite again until it passes must not pay."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..audit import record_audit
from ..database import Database, bump_revision
from ..fitting import fit
from ..ids import new_id, now
from .models import EvaluationSpec, Job


class Verdict(StrEnum):
    """What a suite says of a version. Only `passed` opens a gate."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    ERROR = "error"


class NewVerdict(BaseModel, frozen=True):
    """What an evaluation found; `baseline` is the digest it was compared with. The report stays with the job."""

    digest: str
    suite: str
    suite_digest: str
    fingerprint: str = Field(min_length=1, max_length=64)
    baseline: str
    verdict: Verdict
    reason: str
    looks: int = Field(ge=1, le=2)

    @classmethod
    def from_result(cls, spec: EvaluationSpec, data: dict[str, Any], *, baseline: str) -> NewVerdict:
        """Read `result.data` of an evaluation. Raises `ValueError` when it names no verdict."""
        try:
            _Report.model_validate(data)
            return cls.model_validate(
                {
                    "digest": spec.digest,
                    "suite": spec.suite,
                    "suite_digest": spec.suite_digest,
                    "fingerprint": data.get("fingerprint"),
                    "baseline": baseline,
                    "verdict": data.get("verdict"),
                    "reason": data.get("reason"),
                    "looks": spec.look,
                }
            )
        except ValidationError as error:
            names = ", ".join(str(found["loc"][0]) for found in error.errors())
            raise ValueError(f"the evaluation left a result whose {names} cannot be read") from error


class _Report(BaseModel):
    report: dict[str, Any]


class StoredVerdict(BaseModel, frozen=True):
    """The verdict that stands, which may be an earlier one."""

    verdict: Verdict
    reason: str
    looks: int


def supersedes(new: Verdict, looks: int, *, old: Verdict, old_looks: int) -> bool:
    """Whether a new verdict may take the place of a stored one.

    Only the declared larger look changes an inconclusive verdict. `error` is none: nothing was judged.
    """
    if old is Verdict.ERROR:
        return True
    return old is Verdict.INCONCLUSIVE and old_looks == 1 and looks == 2 and new is not Verdict.ERROR


async def store_verdict(connection: AsyncConnection, new: NewVerdict, job: Job) -> StoredVerdict:
    """Store a verdict unless the project has one already, in the caller's transaction; returns the one that stands."""
    table = tables.verdicts
    same = (
        (table.c.project_id == job.project_id)
        & (table.c.digest == new.digest)
        & (table.c.suite_digest == new.suite_digest)
        & (table.c.fingerprint == new.fingerprint)
        & (table.c.baseline == new.baseline)
    )
    old = (await connection.execute(select(table).where(same))).one_or_none()
    values = {
        **fit(table, new.model_dump(mode="json")),
        "job_id": job.id,
        "created_at": now(),
        "created_by": job.created_by,
    }
    if old is None:
        await connection.execute(insert(table).values(id=new_id("verdict-"), project_id=job.project_id, **values))
    elif supersedes(new.verdict, new.looks, old=Verdict(old.verdict), old_looks=old.looks):
        await connection.execute(update(table).where(table.c.id == old.id).values(**values))
    else:
        return StoredVerdict(verdict=Verdict(old.verdict), reason=old.reason, looks=old.looks)
    await record_audit(
        connection,
        project_id=job.project_id,
        actor=job.created_by,
        action="verdict",
        subject=job.spec.target if isinstance(job.spec, EvaluationSpec) else new.digest,
        before=None if old is None else {"verdict": old.verdict, "looks": old.looks},
        after={"verdict": new.verdict, "suite": new.suite, "looks": new.looks, "job": job.id},
        reason=new.reason,
    )
    await bump_revision(connection)
    return StoredVerdict(verdict=new.verdict, reason=new.reason, looks=new.looks)


class VerdictRow(BaseModel, frozen=True):
    """A stored verdict as it is shown; its report is the job's."""

    suite: str
    suite_digest: str
    verdict: Verdict
    reason: str
    fingerprint: str
    baseline: str
    looks: int
    job_id: str
    created_at: datetime


async def verdict_rows(database: Database, digest: str, *, project_id: str) -> tuple[VerdictRow, ...]:
    """What evaluations said of these weights, newest first."""
    table = tables.verdicts
    query = (
        select(table)
        .where(table.c.digest == digest, table.c.project_id == project_id)
        .order_by(table.c.created_at.desc(), table.c.id.desc())
    )
    async with database.read() as connection:
        rows = (await connection.execute(query)).mappings().all()
    return tuple(VerdictRow.model_validate({name: row[name] for name in VerdictRow.model_fields}) for row in rows)
