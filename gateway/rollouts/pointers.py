"""Where a route's pointers go on a promotion or a rollback. Pure: reads no clock and no database.

A rollback ends the trial if there is one, else it returns stable to previous. A trial is what the route's row says is
being tried; whoever gave an arm its share wrote it there. The versions that are taken back are marked, and a marked one
gets traffic again by force only. `previous` therefore never names a marked version, and a rollback without force cannot
land on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import Conflict, Invalid, Refused


@dataclass(frozen=True, slots=True)
class Pointers:
    """The pointers of one route, what it tries, and the base model under it."""

    base: str
    stable: str
    previous: str
    candidate: str | None = None
    tried: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Past:
    """What decides whether traffic may return to a version."""

    name: str
    version: int
    was_stable: bool
    is_rolled_back: bool
    is_servable: bool = True
    was_gated: bool = False  # it became stable through the route's gates, not by force


@dataclass(frozen=True, slots=True)
class Move:
    """A decision: the new pointers, the marks that change with them, and the tried arms that lose their share."""

    pointers: Pointers
    marks: tuple[str, ...] = ()
    unmarks: str | None = None
    withdrawn: tuple[str, ...] = ()


def promote(pointers: Pointers, target: str | None, versions: Sequence[Past], *, force: bool) -> Move:
    """previous := stable, stable := target (or the candidate)."""
    chosen = target or pointers.candidate
    if chosen is None:
        raise Conflict("the route has no candidate: name the version to promote", code="no_candidate", param="target")
    found = _find(versions, chosen)
    if chosen == pointers.stable:
        raise Conflict(f"{chosen} is stable already", code="already_stable", param="target")
    if found.is_rolled_back and not force:
        raise Refused(
            f"{chosen} was rolled back; promoting it again needs `force` and a reason",
            code="rolled_back",
            param="target",
        )
    candidate = None if pointers.candidate == chosen else pointers.candidate
    moved = replace(pointers, stable=chosen, previous=pointers.stable, candidate=candidate, tried=())
    return Move(moved, unmarks=chosen if found.is_rolled_back else None)


def tried_by(stable: str, arms: Sequence[str], said: Sequence[str] | None) -> tuple[str, ...]:
    """What a split over `arms` (targets with a share) tries: what it says, else every arm but stable. Arms beside are controls."""
    if said is None:
        return tuple(arm for arm in arms if arm != stable)
    for name in said:
        if name == stable:
            raise Invalid(
                f"{name} is stable: a trial is held against it, so it cannot be what is tried",
                code="trial_of_stable",
                param="tries",
            )
        if name not in arms:
            raise Invalid(
                f"{name!r:.100} has no share in this split, so it cannot be what is tried",
                code="trial_without_share",
                param="tries",
            )
    return tuple(dict.fromkeys(said))


def is_relative(to: str | None, route: str) -> bool:
    """Whether a rollback goes where the pointers lead, and not to a version that was named."""
    return to is None or to in (f"{route}@stable", f"{route}@previous")


def resolved(to: str | None, route: str, pointers: Pointers, versions: Sequence[Past]) -> str | None:
    """What `support@stable` or `support@previous` stands for now; anything else is what it says."""
    if to == f"{route}@stable":
        return pointers.stable
    return previous_of(pointers, versions) if to == f"{route}@previous" else to


def roll_back(pointers: Pointers, versions: Sequence[Past], *, to: str | None, force: bool) -> Move:
    """End the trial, so that stable takes all; without one stable := previous. Or go `to` a version.

    What is taken back is marked. When stable moves, previous := the next older one that may be returned to. With `to`
    the trial ends too, unmarked: it is stable that was found wanting.
    """
    if pointers.tried and to in (None, pointers.stable) and _is_servable(pointers.stable, pointers, versions):
        return _end_trial(pointers, versions)
    if pointers.stable == pointers.base:
        raise Conflict(
            f"the route is on its base model {pointers.base} already: there is nothing to roll back",
            code="nothing_to_roll_back",
        )
    target = previous_of(pointers, versions) if to is None else _chosen(pointers, versions, to, force=force)
    was_marked = any(past.name == target and past.is_rolled_back for past in versions)
    taken_back = (pointers.stable, *pointers.tried) if to is None else (pointers.stable,)
    left = tuple(name for name in taken_back if name not in (target, pointers.base))
    candidate = None if pointers.candidate in (target, *left) else pointers.candidate
    older = next_older(target, versions, base=pointers.base, leaving=left)
    moved = replace(pointers, stable=target, previous=older, candidate=candidate, tried=())
    return Move(moved, marks=left, unmarks=target if was_marked else None)


def _end_trial(pointers: Pointers, versions: Sequence[Past]) -> Move:
    tried = pointers.tried
    previous = pointers.previous
    if previous in tried and previous != pointers.base:  # a version that was stable once, and is tried again
        previous = next_older(previous, versions, base=pointers.base, leaving=(pointers.stable, *tried))
    candidate = None if pointers.candidate in tried else pointers.candidate
    moved = replace(pointers, previous=previous, candidate=candidate, tried=())
    return Move(moved, marks=tuple(name for name in tried if name != pointers.base), withdrawn=tried)


def next_older(name: str, versions: Sequence[Past], *, base: str, leaving: Sequence[str]) -> str:
    """The newest version older than `name` that was stable once, is not marked and can be served; else base."""
    number = next((past.version for past in versions if past.name == name), 0)
    older = [
        past
        for past in versions
        if past.version < number
        and past.was_stable
        and past.is_servable
        and not past.is_rolled_back
        and past.name not in leaving
    ]
    return max(older, key=lambda past: past.version).name if older else base


def _is_servable(name: str, pointers: Pointers, versions: Sequence[Past]) -> bool:
    return name == pointers.base or any(past.name == name and past.is_servable for past in versions)


def previous_of(pointers: Pointers, versions: Sequence[Past]) -> str:
    """Where `previous` leads now: past whatever was quarantined since."""
    if pointers.previous == pointers.base:
        return pointers.base
    found = next((past for past in versions if past.name == pointers.previous), None)
    if found is not None and found.is_servable and not found.is_rolled_back:
        return pointers.previous
    # `previous` was quarantined since: go where it would have pointed without it.
    return next_older(pointers.previous, versions, base=pointers.base, leaving=(pointers.stable,))


def _chosen(pointers: Pointers, versions: Sequence[Past], to: str, *, force: bool) -> str:
    if to == pointers.stable:
        raise Conflict(f"{to} is stable now: there is nothing to roll back", code="already_stable", param="to")
    if to == pointers.base:
        return to
    found = _find(versions, to, param="to")
    if not found.was_stable:
        raise Invalid(f"{to} was never stable: promote it instead", code="never_stable", param="to")
    if not found.is_servable:
        raise Refused(f"{to} was rejected or quarantined and cannot be served", code="not_verified", param="to")
    if found.is_rolled_back and not force:
        raise Refused(
            f"{to} was rolled back itself; returning to it needs `force` and a reason", code="rolled_back", param="to"
        )
    return to


def _find(versions: Sequence[Past], name: str, *, param: str = "target") -> Past:
    for past in versions:
        if past.name == name:
            return past
    raise Invalid(f"{name!r:.100} is not a version of this route's adapter", code="not_a_version", param=param)
