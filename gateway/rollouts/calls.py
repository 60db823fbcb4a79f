"""Calls that move traffic, and their answers for a day: whoever lost a reply asks again and moves nothing twice.

A call is the same as an earlier one when it carries the same idempotency key, or when it asks the same of the same
revision of the route: that revision is gone, so it can only mean the move that was made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256

from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..errors import Invalid, Refused
from ..ids import new_id, now
from ..keys import Principal
from .models import Moved

KEPT = timedelta(days=1)
MAX_REASON_CHARS = 1_000
MAX_KEY_CHARS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Who asks to move which route, on which state of it, and why."""

    action: str
    route: str
    principal: Principal
    # What it does; consents such as `force` are no part of it.
    asked: Mapping[str, object] = field(default_factory=dict)
    force: bool = False
    reason: str | None = None
    expected_revision: int | None = None
    idempotency_key: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.force and self.reason is None:
            raise Invalid(
                "`force` needs a `reason`; it goes into the audit log", code="reason_required", param="reason"
            )
        if self.reason is not None and len(self.reason) > MAX_REASON_CHARS:
            raise Invalid(f"the reason is over {MAX_REASON_CHARS} characters", code="reason_too_long", param="reason")
        key = self.idempotency_key
        if key is not None and not (0 < len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
            raise Invalid(
                f"the idempotency key must be 1 to {MAX_KEY_CHARS} printable ASCII characters, such as a UUID",
                code="bad_idempotency_key",
                param="idempotency-key",
            )

    @property
    def digest(self) -> str:
        """sha256 over what it asks."""
        said = json.dumps([self.action, self.route, self.asked], sort_keys=True)
        return sha256(said.encode()).hexdigest()


def stated(reason: str | None) -> str | None:
    """A reason without blanks around it; None when nothing is left."""
    return (reason or "").strip() or None


async def first_answer(connection: AsyncConnection, call: Call) -> Moved | None:
    """The answer of the call that this one repeats; None when it is new.

    Raises `Refused` when its idempotency key belongs to a call that asked for something else.
    """
    table = tables.moves
    known = select(table).where(table.c.project_id == call.principal.project_id, table.c.at > now() - KEPT)
    if call.idempotency_key is not None:
        by_key = known.where(table.c.idempotency_key == call.idempotency_key)
        row = (await connection.execute(by_key)).mappings().one_or_none()
        if row is not None and row["asked"] != call.digest:
            raise Refused(
                f"idempotency key {call.idempotency_key!r} was used for another move, of route {row['route']!r}; "
                "take a new key for each move",
                code="idempotency_key_reused",
                param="idempotency-key",
            )
        if row is not None:
            return _again(row["answer"])
    if call.expected_revision is None:
        return None
    by_revision = known.where(
        table.c.route == call.route, table.c.revision == call.expected_revision, table.c.asked == call.digest
    )
    row = (await connection.execute(by_revision.limit(1))).mappings().one_or_none()
    return _again(row["answer"]) if row is not None else None


def _again(answer: object) -> Moved:
    return Moved.model_validate(answer).model_copy(update={"repeated": True})


async def keep_answer(connection: AsyncConnection, call: Call, moved: Moved) -> None:
    """Remember the answer, in the transaction of the move, and forget those whose day is over."""
    await connection.execute(delete(tables.moves).where(tables.moves.c.at <= now() - KEPT))
    await connection.execute(
        insert(tables.moves).values(
            id=new_id("move-"),
            project_id=call.principal.project_id,
            at=now(),
            actor=call.principal.actor,
            route=call.route,
            revision=moved.before.revision,
            asked=call.digest,
            idempotency_key=call.idempotency_key,
            answer=moved.model_dump(mode="json"),
        )
    )
