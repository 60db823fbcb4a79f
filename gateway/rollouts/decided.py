"""A route after a move that nothing speaks against. Pure, but for the clock that it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from ..errors import Conflict
from ..routing.models import LastMove, Route, Trial, Variant, shares_text
from .pointers import Move, Pointers, tried_by


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """What a move makes of a route, and which marks change with it."""

    after: Route
    moved_from: str
    moved_to: str
    marks: tuple[str, ...] = ()
    unmarks: str | None = None
    arrives: str | None = None  # what becomes stable
    is_gated: bool = False  # and did so by passed gates
    needs_load: bool = False


@dataclass(frozen=True, slots=True)
class Mover:
    """Who moves, and when."""

    actor: str
    at: datetime


def pointers_of(route: Route, base: str) -> Pointers:
    """The part of a route that pure decisions are made on."""
    return Pointers(
        base=base, stable=route.stable, previous=route.previous, candidate=route.candidate, tried=route.tried
    )


def promoted(held: Route, move: Move, mover: Mover, *, is_gated: bool) -> Decided:
    """All traffic to the new stable."""
    target = move.pointers.stable
    last = last_move("promote", held, mover, moved_from=held.stable, moved_to=target)
    return Decided(
        after=_all_to_stable(held, move, last),
        moved_from=held.stable,
        moved_to=target,
        unmarks=move.unmarks,
        arrives=target,
        is_gated=is_gated,
    )


def rolled_back(held: Route, move: Move, mover: Mover, *, needs_load: bool) -> Decided:
    """All traffic to stable: the one that a trial was held against, or the one before."""
    moved_from, target = ", ".join(move.withdrawn) or held.stable, move.pointers.stable
    last = last_move("rollback", held, mover, moved_from=moved_from, moved_to=target)
    return Decided(
        after=_all_to_stable(held, move, last),
        moved_from=moved_from,
        moved_to=target,
        marks=move.marks,
        unmarks=move.unmarks,
        arrives=target,
        needs_load=needs_load,
    )


def split(held: Route, wanted: Sequence[Variant], tries: Sequence[str] | None, mover: Mover) -> Decided:
    """Shares as they are wanted; what it tries becomes the route's trial."""
    variants = tuple(wanted)
    arms = tuple(variant.target for variant in variants if variant.weight)
    tried = tried_by(held.stable, arms, tries)
    trial = None
    if tried:
        is_same = held.trial is not None and held.trial.arms == tried
        since = held.trial.since_revision if held.trial is not None and is_same else held.revision + 1
        trial = Trial(arms=tried, against=held.stable, since_revision=since)
    moved_from, moved_to = shares_text(held.variants), shares_text(variants)
    last = last_move("split", held, mover, moved_from=moved_from, moved_to=moved_to)
    after = held.model_copy(update={"variants": variants, "trial": trial, "last_move": last})
    return Decided(after=after, moved_from=moved_from, moved_to=moved_to)


def check_goes_no_further(held: Route, *, leads_to: str) -> None:
    """Raise `Conflict` when the last move was a rollback: this one would take a second step back that nobody asked for.

    A rollback is pressed twice by mistake, or again because its answer was lost, far more often than by intent.
    """
    last = held.last_move
    if last is None or last.action != "rollback":
        return
    told = f", {last.at:%Y-%m-%d %H:%M:%S} UTC by {last.by}: {last.moved_from} → {last.moved_to} (revision {last.revision})"
    raise already_rolled_back(held.name, leads_to=leads_to, told=told)


def already_rolled_back(route: str, *, leads_to: str, told: str = "") -> Conflict:
    """The error of a second step back that nobody asked for."""
    return Conflict(
        f"{route!r} was rolled back already{told}. Nothing moved now. To go further back, to {leads_to}: "
        f"`turnout rollback {route} --further`, or name the version with `--to`",
        code="already_rolled_back",
        param="further",
    )


def _all_to_stable(held: Route, move: Move, last: LastMove) -> Route:
    pointers = move.pointers
    return held.model_copy(
        update={
            "stable": pointers.stable,
            "previous": pointers.previous,
            "candidate": pointers.candidate,
            "variants": (Variant(target=pointers.stable, weight=100),),
            "trial": None,
            "last_move": last,
        }
    )


def last_move(action: str, held: Route, mover: Mover, *, moved_from: str, moved_to: str) -> LastMove:
    """How traffic came to be where it is after this move."""
    return LastMove.model_validate(
        {
            "action": action,
            "moved_from": moved_from,
            "moved_to": moved_to,
            "revision": held.revision + 1,
            "at": mover.at,
            "by": mover.actor,
        }
    )
