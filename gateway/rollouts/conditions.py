"""What must hold before a version gets traffic: verified, loaded on every ready engine, passed by its gates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from .. import tables
from ..errors import Conflict, Invalid, Refused
from ..lease import FRESH_WITHIN_S, residency_is_fresh, seconds_silent
from ..names import engine_name, parse_pin, version_name
from ..registry.models import ReplicaState, ResidencyState, VersionState
from ..routing.models import Route, Variant
from .pointers import Past


class RouteVersion(BaseModel, frozen=True):
    """What the checks need of a version."""

    id: str
    adapter: str
    digest: str
    base_model: str
    base_digest: str
    state: VersionState
    past: Past
    is_retired: bool = False

    @property
    def name(self) -> str:
        """`support@3`."""
        return self.past.name

    @property
    def engine_name(self) -> str:
        """The name that engines serve it under."""
        return engine_name(self.adapter, self.past.version, self.digest)


async def versions_of(connection: AsyncConnection, route: Route) -> list[RouteVersion]:
    """Versions of the adapter that the route is named after."""
    table = tables.adapter_versions
    rows = await connection.execute(
        select(table).where(table.c.adapter == route.name, table.c.project_id == route.project_id)
    )
    return [_version(row) for row in rows.mappings()]


def _version(row: Any) -> RouteVersion:
    past = Past(
        name=version_name(row["adapter"], row["version"]),
        version=row["version"],
        was_stable=row["promoted_at"] is not None,
        is_rolled_back=row["rolled_back_at"] is not None,
        is_servable=row["state"] == VersionState.VERIFIED and row["retired_at"] is None,
        was_gated=row["gated_at"] is not None,
    )
    return RouteVersion(
        id=row["id"],
        adapter=row["adapter"],
        digest=row["digest"],
        base_model=row["base_model"],
        base_digest=row["base_digest"],
        state=VersionState(row["state"]),
        past=past,
        is_retired=row["retired_at"] is not None,
    )


def named(versions: Sequence[RouteVersion], name: str) -> RouteVersion:
    """The version of that name; `Invalid` when the adapter has none."""
    found = next((version for version in versions if version.name == name), None)
    if found is None:
        raise Invalid(f"{name!r:.100} is not a version of this route's adapter", code="not_a_version", param="target")
    return found


def digest_of(versions: Sequence[RouteVersion], target: str) -> str:
    """Digest of what a route's pointer names: a version's bundle, else the base model's family."""
    return next((version.digest for version in versions if version.name == target), versions[0].base_digest)


def check_verified(version: RouteVersion) -> None:
    """Raise `Refused` unless it ran on its base and was found sane."""
    if version.is_retired:
        text = f"{version.name} is retired; `turnout adapters restore {version.name}` brings it back"
        raise Refused(text, code="version_retired", param="target")
    if version.state is VersionState.VERIFIED:
        return
    later = "wait for its verification" if version.state is VersionState.RECEIVED else "it can never be served"
    raise Refused(f"{version.name} is {version.state}: {later}", code="not_verified", param="target")


async def check_resident(connection: AsyncConnection, version: RouteVersion) -> None:
    """Raise `Conflict` unless every ready engine, and one at least, has it loaded, as somebody alive says."""
    await check_fresh(connection)
    ready = await _ready_replicas(connection)
    if not ready:
        raise Conflict("no engine is ready: nothing can be promoted until one is", code="no_ready_engine")
    missing = ready - await _holders(connection, version.engine_name)
    if missing:
        raise Conflict(
            f"{version.name} is not loaded on {', '.join(sorted(missing))} yet; see `turnout adapters show {version.name}`",
            code="not_resident",
            param="target",
        )


def check_may_serve(route: Route, versions: Sequence[RouteVersion], variant: Variant) -> None:
    """Raise unless `variant` may be an arm of the route."""
    if parse_pin(variant.target) is None:
        if variant.target != versions[0].base_model:
            raise Invalid(
                f"{variant.target!r:.100} is neither this route's base model nor a version such as {route.name}@1",
                code="unknown_target",
                param="variants",
            )
        return
    check_verified(named(versions, variant.target))


def check_not_rolled_back(version: RouteVersion) -> None:
    """Raise `Refused` for a version that a rollback has taken back."""
    if version.past.is_rolled_back:
        raise Refused(
            f"{version.name} was rolled back; it gets a larger share again only with `force` and a reason",
            code="rolled_back",
            param="variants",
        )


def rising(route: Route, versions: Sequence[RouteVersion], wanted: Sequence[Variant]) -> list[RouteVersion]:
    """Versions that would get a larger share than they have. To take some away needs no condition."""
    had, gets = shares(route.variants), shares(wanted)
    return [version for version in versions if gets.get(version.name, 0) > had.get(version.name, 0)]


def shares(variants: Sequence[Variant]) -> dict[str, Fraction]:
    """What part of the traffic each target gets."""
    total = sum(variant.weight for variant in variants)
    return {variant.target: Fraction(variant.weight, total) for variant in variants if total}


async def needs_load(connection: AsyncConnection, versions: Sequence[RouteVersion], target: str) -> bool:
    """Whether requests for `target` may fail until an engine has loaded it, as far as anybody alive knows; base needs no load."""
    version = next((found for found in versions if found.name == target), None)
    if version is None:
        return False
    return not await residency_is_fresh(connection) or not await _is_held(connection, version)


async def check_strands_nobody(
    connection: AsyncConnection, route: Route, versions: Sequence[RouteVersion], target: str
) -> None:
    """Raise `Conflict` when traffic is answered now and would not be after a move to `target`, which needs a load.

    With no engine ready there is nothing to lose: whatever a route needs is loaded before an engine is ready. What is
    only unknown, because nobody looks after the engines, stops no rollback.
    """
    version = next((found for found in versions if found.name == target), None)
    if version is None or not await _ready_replicas(connection) or await _is_held(connection, version):
        return
    raise would_strand(route.name, target, base=version.base_model)


def would_strand(route: str, target: str, *, base: str) -> Conflict:
    """The error of a move onto what no engine would answer yet."""
    return Conflict(
        f"{target} is not loaded on every engine that takes traffic: requests for {route!r} would fail until it is. "
        f"Wait for the load and move then (`turnout rollback {route} --to {target} --wait-for-load`), go to the base "
        f"model {base}, which is always there, or move all the same (`--accept-load`)",
        code="needs_load",
        param="to",
    )


async def _is_held(connection: AsyncConnection, version: RouteVersion) -> bool:
    ready = await _ready_replicas(connection)
    return bool(ready) and ready <= await _holders(connection, version.engine_name)


async def check_fresh(connection: AsyncConnection) -> None:
    """Raise `Conflict` while nobody looks after the engines: what is said of them may be long over."""
    silent_s = await seconds_silent(connection)
    if silent_s > FRESH_WITHIN_S:
        since = "ever" if math.isinf(silent_s) else f"for {silent_s:.0f} s"
        raise Conflict(
            f"no controller has told {since} which engines live and what they hold, so what the tables say counts as "
            "unknown; see `turnout status`, start the server again (`turnout serve`), and try again",
            code="residency_unknown",
            param="target",
        )


async def _ready_replicas(connection: AsyncConnection) -> set[str]:
    table = tables.replicas
    return set((await connection.execute(select(table.c.id).where(table.c.state == ReplicaState.READY))).scalars())


async def _holders(connection: AsyncConnection, engine_name: str) -> set[str]:
    table = tables.residency
    query = select(table.c.replica_id).where(table.c.engine_name == engine_name, table.c.state == ResidencyState.READY)
    return set((await connection.execute(query)).scalars())


async def newest_verdict(
    connection: AsyncConnection,
    version: RouteVersion,
    suite: str,
    suite_digest: str | None,
    *,
    baseline: str,
    project_id: str,
) -> str | None:
    """What the last evaluation of these very weights on the suite said, against this baseline; None: there was none."""
    table = tables.verdicts
    query = select(table.c.verdict).where(
        table.c.digest == version.digest,
        table.c.suite == suite,
        table.c.baseline == baseline,
        table.c.project_id == project_id,
    )
    if suite_digest is not None:
        query = query.where(table.c.suite_digest == suite_digest)
    found = await connection.execute(query.order_by(table.c.created_at.desc(), table.c.id.desc()).limit(1))
    return found.scalar_one_or_none()
