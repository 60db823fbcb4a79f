"""What a journalled rollback means for its route when the database is back. Pure: reads no clock and no database.

What the rollback took out of traffic stays out, whoever moved the route since. A later move that sends nothing there stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .journal import Rollback
from .pointers import Past, Pointers, next_older


@dataclass(frozen=True, slots=True)
class Settlement:
    """What the database is told: the pointers, the marks, and whether traffic moves by it."""

    pointers: Pointers
    moves_traffic: bool
    marks: tuple[str, ...]
    unmarks: str | None = None


def settle(
    pointers: Pointers, shares: Sequence[str], versions: Sequence[Past], record: Rollback, *, is_unmoved: bool
) -> Settlement:
    """Carry a rollback into a route as it is now; `shares` are the targets that get traffic.

    `is_unmoved`: the route is as it was when the rollback was decided.
    """
    is_needed = is_unmoved or not {pointers.stable, *shares}.isdisjoint(record.left)
    stable = _stable(pointers, versions, record) if is_needed else pointers.stable
    candidate = None if pointers.candidate in (*record.left, stable) else pointers.candidate
    settled = Pointers(
        base=pointers.base, stable=stable, previous=_previous(stable, pointers, versions, record), candidate=candidate
    )
    was_marked = stable != pointers.stable and any(past.name == stable and past.is_rolled_back for past in versions)
    return Settlement(settled, moves_traffic=is_needed, marks=record.marks, unmarks=stable if was_marked else None)


def _stable(pointers: Pointers, versions: Sequence[Past], record: Rollback) -> str:
    """What is stable now if it was not left; else where the rollback went; else what is older."""
    if pointers.stable not in record.left and _is_servable(pointers.stable, pointers, versions):
        return pointers.stable
    target = record.after.stable
    if _may_return(target, pointers, versions, record):
        return target
    return next_older(target, versions, base=pointers.base, leaving=(pointers.stable, *record.left))


def _previous(stable: str, pointers: Pointers, versions: Sequence[Past], record: Rollback) -> str:
    if stable != pointers.stable:
        return next_older(stable, versions, base=pointers.base, leaving=(pointers.stable, *record.left))
    if pointers.previous in record.left:
        return next_older(pointers.previous, versions, base=pointers.base, leaving=(stable, *record.left))
    return pointers.previous


def _is_servable(name: str, pointers: Pointers, versions: Sequence[Past]) -> bool:
    return name == pointers.base or any(past.name == name and past.is_servable for past in versions)


def _may_return(target: str, pointers: Pointers, versions: Sequence[Past], record: Rollback) -> bool:
    is_marked = any(past.name == target and past.is_rolled_back for past in versions)
    return _is_servable(target, pointers, versions) and (not is_marked or target == record.unmarks)
