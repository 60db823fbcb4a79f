"""From the `model` of a request to the one variant that answers it. Names it does not know are refused, never base."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import Conflict, Forbidden, NotFound, Unavailable
from ..keys import Principal
from ..names import parse_pin
from ..routing.assignment import assign
from ..routing.snapshot import Snapshot, SnapshotReplica, SnapshotRoute, SnapshotVersion
from .fields import unknown_model

ALIASES = ("stable", "previous", "candidate")
_ALIAS = re.compile(r"^(?P<route>[a-z0-9][a-z0-9-]{0,47})@(?P<alias>stable|previous|candidate)$")


@dataclass(frozen=True, slots=True)
class Answering:
    """What answers one request, and what its headers say."""

    route: str
    variant: str
    digest: str
    engine_name: str
    replicas: tuple[SnapshotReplica, ...]
    is_assigned: bool


def resolve(snapshot: Snapshot, model: str, principal: Principal, unit: str) -> Answering:
    """What answers `model` for this principal and this sticky unit.

    Raises `NotFound` for a name that is unknown or another project's, `Forbidden` for a version that needs scope
    `preview`, `Unavailable` when the variant is ready nowhere: another one never takes its place.
    """
    route = snapshot.routes.get(model)
    if route is not None and route.project_id == principal.project_id:
        return _by_route(snapshot, route, principal, unit)
    if model in snapshot.bases:
        return _answering(snapshot, model, model, code="engine_unavailable", is_assigned=False)
    alias = _ALIAS.match(model)
    if alias is not None:
        return _by_alias(snapshot, alias["route"], alias["alias"], principal)
    version = snapshot.versions.get(model) if parse_pin(model) else None
    if version is None or version.project_id != principal.project_id:
        raise unknown_model(model)
    _check_may_pin(version, principal)
    return _answering(snapshot, version.adapter, version.name, code="version_not_loaded", is_assigned=False)


def _by_route(snapshot: Snapshot, route: SnapshotRoute, principal: Principal, unit: str) -> Answering:
    # An evaluation is neither assigned nor counted: by a route's name it gets what is stable.
    is_assigned = "evaluate" not in principal.scopes
    target = assign(route.salt, unit, route.variants) if is_assigned else route.stable
    return _answering(snapshot, route.name, target, code="variant_not_ready", is_assigned=is_assigned)


def _by_alias(snapshot: Snapshot, name: str, alias: str, principal: Principal) -> Answering:
    route = snapshot.routes.get(name)
    if route is None or route.project_id != principal.project_id:
        raise unknown_model(f"{name}@{alias}")
    target = {"stable": route.stable, "previous": route.previous, "candidate": route.candidate}[alias]
    if target is None:
        raise NotFound(f"route {name!r} has no candidate", code="model_not_found", param="model")
    version = snapshot.versions.get(target)
    if version is not None:
        _check_may_pin(version, principal)
    return _answering(snapshot, name, target, code="version_not_loaded", is_assigned=False)


def may_pin(version: SnapshotVersion, principal: Principal) -> bool:
    """Whether `principal` may name this version: it was promoted once, or is its own, or it may preview."""
    return version.is_promoted or principal.actor in version.owners or principal.allows("preview")


def _check_may_pin(version: SnapshotVersion, principal: Principal) -> None:
    if not may_pin(version, principal):
        raise Forbidden(
            f"{version.name} was never promoted; naming it needs a key with scope 'preview' or the key that made it",
            param="model",
        )
    if version.state in ("rejected", "quarantined"):
        raise Conflict(
            f"{version.name} is {version.state} and is not served; see `turnout adapters show {version.name}`",
            code=f"version_{version.state}",
            param="model",
        )
    if version.is_retired:
        raise Conflict(
            f"{version.name} is retired and is not served; `turnout adapters restore {version.name}` brings it back",
            code="version_retired",
            param="model",
        )


def _answering(snapshot: Snapshot, route: str, target: str, *, code: str, is_assigned: bool) -> Answering:
    base = snapshot.bases.get(target)
    if base is not None:
        replicas = snapshot.serving(None)
        digest, engine_name, code = base.digest, base.name, "engine_unavailable"
    else:
        version = snapshot.versions.get(target)
        servable = version is not None and version.state == "verified" and not version.is_retired
        digest, engine_name = (version.digest, version.engine_name) if version is not None else ("", "")
        replicas = snapshot.serving(engine_name) if servable else []
    if not replicas:
        raise Unavailable(f"{target!r} is loaded on no engine now; try again in a moment", code=code, param="model")
    return Answering(route, target, digest, engine_name, tuple(replicas), is_assigned)
