"""Routes in the database. Every change is a compare-and-swap on the route's revision, in the caller's transaction."""

from __future__ import annotations

import secrets
from typing import Any, Protocol

from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..audit import record_audit
from ..database import bump_revision
from ..errors import Conflict, NotFound
from ..ids import now
from .models import Route, Variant


class PublishedVersion(Protocol):
    """What a route needs to know of a version when its adapter appears."""

    @property
    def adapter(self) -> str:
        """Name of the adapter, and of its route."""

    @property
    def base_model(self) -> str:
        """What the route serves until something is promoted."""

    @property
    def created_by(self) -> str:
        """Who published it."""

    @property
    def project_id(self) -> str:
        """Whose it is."""


async def create_route_for(connection: AsyncConnection, version: PublishedVersion) -> None:
    """Make the route of an adapter when its first version arrives: all traffic to base. Later versions change nothing."""
    table = tables.routes
    found = await connection.execute(select(table.c.name).where(table.c.name == version.adapter))
    if found.first() is not None:
        return
    moment = now()
    variants = [{"target": version.base_model, "weight": 100}]
    await connection.execute(
        insert(table).values(
            name=version.adapter,
            project_id=version.project_id,
            created_at=moment,
            created_by=version.created_by,
            revision=1,
            salt=secrets.token_hex(16),
            stable=version.base_model,
            previous=version.base_model,
            candidate=None,
            variants=variants,
            trial=None,
            last_move=None,
            gates=[],
            updated_at=moment,
            updated_by=version.created_by,
        )
    )
    await record_audit(
        connection,
        project_id=version.project_id,
        actor=version.created_by,
        action="route.create",
        subject=version.adapter,
        after={"stable": version.base_model, "variants": variants},
    )
    await bump_revision(connection)


async def get_route(connection: AsyncConnection, name: str, *, project_id: str) -> Route:
    """The route, or `NotFound`; another project's looks the same."""
    table = tables.routes
    found = await connection.execute(select(table).where(table.c.name == name, table.c.project_id == project_id))
    row = found.mappings().one_or_none()
    if row is None:
        raise NotFound(f"no route {name!r:.100}; `GET /api/routes` lists them", code="route_not_found")
    return _route(row)


async def list_routes(connection: AsyncConnection, *, project_id: str) -> list[Route]:
    """Every route of the project, by name."""
    table = tables.routes
    found = await connection.execute(select(table).where(table.c.project_id == project_id).order_by(table.c.name))
    return [_route(row) for row in found.mappings()]


async def save_route(connection: AsyncConnection, route: Route, *, actor: str) -> Route:
    """Store `route`, which was read at `route.revision`, as the next revision. `Conflict` if another change came first."""
    table = tables.routes
    saved = route.model_copy(update={"revision": route.revision + 1, "updated_at": now(), "updated_by": actor})
    moved = await connection.execute(
        update(table)
        .where(table.c.name == route.name, table.c.revision == route.revision)
        .values(
            revision=saved.revision,
            stable=saved.stable,
            previous=saved.previous,
            candidate=saved.candidate,
            variants=[variant.model_dump() for variant in saved.variants],
            trial=saved.trial.model_dump() if saved.trial else None,
            last_move=saved.last_move.model_dump(mode="json") if saved.last_move else None,
            gates=list(saved.gates),
            updated_at=saved.updated_at,
            updated_by=saved.updated_by,
        )
    )
    if moved.rowcount != 1:
        raise route_moved(route.name, expected=route.revision)
    await bump_revision(connection)
    return saved


def route_moved(name: str, *, expected: int, found: int | None = None) -> Conflict:
    """The error of a change that was decided on an older state of the route."""
    now_at = f", it is at {found} now" if found is not None else ""
    return Conflict(
        f"route {name!r} moved since revision {expected}{now_at}; look at it again before changing it",
        code="route_moved",
    )


def _route(row: Any) -> Route:
    variants = tuple(Variant.model_validate(variant) for variant in row["variants"])
    named = {name: row[name] for name in Route.model_fields if name not in ("variants", "gates")}
    return Route(**named, variants=variants, gates=tuple(row["gates"]))
