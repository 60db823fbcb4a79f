"""Moves that the database does not know yet, laid over what it said last. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .snapshot import Snapshot, SnapshotRoute, SnapshotVersion


@dataclass(frozen=True, slots=True)
class Override:
    """What one move makes of one route: all traffic to `stable`, none to `left`."""

    route: str
    project_id: str
    decided_on: int  # the route's revision
    stable: str
    previous: str
    candidate: str | None
    left: tuple[str, ...]
    marks: tuple[str, ...]
    unmarks: str | None = None


def overlaid(snapshot: Snapshot, overrides: Sequence[Override]) -> Snapshot:
    """The snapshot with every move made, in order. Where nothing goes to what a move left, the route has moved on: it stays."""
    for override in overrides:
        snapshot = _with(snapshot, override)
    return snapshot


def _with(snapshot: Snapshot, override: Override) -> Snapshot:
    route = snapshot.routes.get(override.route)
    if route is None or route.project_id != override.project_id:
        return snapshot
    exposed = {route.stable, *(target for target, weight in route.variants if weight)}
    versions = {name: _marked(version, override) for name, version in snapshot.versions.items()}
    if exposed.isdisjoint(override.left) and route.revision != override.decided_on:
        return replace(snapshot, versions=versions)
    return replace(snapshot, versions=versions, routes=snapshot.routes | {route.name: _moved(route, override)})


def _moved(route: SnapshotRoute, override: Override) -> SnapshotRoute:
    # As it will be when the database has the move.
    moved = replace(route, revision=route.revision + 1, trial=None, last_action="rollback")
    is_unmoved = route.revision == override.decided_on
    if route.stable not in override.left and not is_unmoved:  # an arm of a split was left
        return replace(moved, variants=((route.stable, 100),))
    return replace(
        moved,
        stable=override.stable,
        previous=override.previous,
        candidate=override.candidate,
        variants=((override.stable, 100),),
    )


def _marked(version: SnapshotVersion, override: Override) -> SnapshotVersion:
    if version.name in override.marks:
        return replace(version, is_rolled_back=True)
    if version.name == override.unmarks:
        return replace(version, is_rolled_back=False, is_promoted=True)
    return version
