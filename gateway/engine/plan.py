"""Which adapters an engine should hold, and the steps that get it there. Pure: reads no clock, no database, no engine.

Versions are ranked by need, and as many are wanted as there are places. What is loaded stays while nobody of a higher
rank needs its place; then the least needed goes: out of the gateways' table, and out of the engine when none uses it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from ..registry.models import AdapterVersion, ResidencyState
from .models import Resident, Wanted

NO_ROOM = "capacity_exhausted"


@dataclass(frozen=True, slots=True)
class RouteTargets:
    """What one route may send traffic to."""

    stable: str
    previous: str
    weighted: tuple[str, ...]
    candidate: str | None


def live_names(routes: Sequence[RouteTargets]) -> list[str]:
    """What traffic needs, and a rollback: every route's stable and shares, then previous."""
    names = [route.stable for route in routes]
    names += [target for route in routes for target in route.weighted]
    names += [route.previous for route in routes]
    return list(dict.fromkeys(names))


def by_priority(
    versions: Sequence[AdapterVersion],
    routes: Sequence[RouteTargets],
    evaluated: Sequence[str],
    pinned: Collection[str] = (),
) -> list[AdapterVersion]:
    """Verified versions that are not retired, most needed first.

    What routes serve, then previous (a rollback waits for no load), candidates; what somebody pinned a moment ago; what
    evaluations wait for; the others by their last use. A publication counts as a use.
    """
    lately = sorted(versions, key=_last_use, reverse=True)
    names = dict.fromkeys(
        [
            *live_names(routes),
            *(route.candidate for route in routes if route.candidate),
            *(version.name for version in lately if version.name in pinned),
            *evaluated,
            *(version.name for version in lately),
        ]
    )
    known = {version.name: version for version in versions if version.is_servable}
    return [known[name] for name in names if name in known]


def _last_use(version: AdapterVersion) -> tuple[datetime, datetime, str]:
    return (max(version.created_at, version.used_at or version.created_at), version.created_at, version.id)


@dataclass(frozen=True, slots=True)
class Observed:
    """One look at an engine and at what the gateways believe of it."""

    loaded: Mapping[str, str]  # name -> path, as the engine says
    rows: Mapping[str, Resident]
    capacity: int
    leaving: Collection[str] = ()  # taken from the gateways' table a moment ago
    in_use: Collection[str] = ()  # a request was answered by it a moment ago, or is being
    # Not to be brought in now: their files were damaged, or they failed, a moment ago. They keep their places.
    put_off: Collection[str] = ()
    suspects: Collection[str] = ()  # failed since they were last well: the others come first, traffic too


@dataclass(frozen=True, slots=True)
class Load:
    """Verify the files, load, probe."""

    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Probe:
    """Loaded, not known to be right. Whatever became of its files since, the engine has it in memory."""

    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Refuse:
    """There is no room for it while others rank higher."""

    wanted: Wanted


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take it out of the gateways' table; the engine keeps it until they have noticed."""

    engine_name: str


@dataclass(frozen=True, slots=True)
class Unload:
    """No gateway sends traffic to it any more."""

    engine_name: str


Action = Load | Probe | Refuse | Withdraw | Unload


def plan(desired: Sequence[Wanted], observed: Observed) -> list[Action]:
    """All that is to do, cheap steps first, then probes and loads in order of need. Reads no clock."""
    places = _share_out(desired, observed)
    return [*_clear(desired, places, observed), *_refuse(places, observed), *_fill(places, observed)]


def is_restored(desired: Sequence[Wanted], observed: Observed) -> bool:
    """Whether each version that routes need is answerable, or waiting would not make it so."""
    kept = {one.engine_name for one in _share_out(desired, observed).kept}
    waived = {*observed.put_off, *observed.suspects}
    return all(
        _is_ready(one, observed) or one.engine_name in waived or one.engine_name not in kept
        for one in desired
        if one.is_needed
    )


def touch_order(desired: Sequence[Wanted], loaded: Collection[str]) -> list[str]:
    """What is loaded, least needed first: asked in this order, the engine forgets what is needed last of all."""
    ranked = [one.engine_name for one in reversed(desired) if one.engine_name in loaded]
    return [*sorted(set(loaded) - set(ranked)), *ranked]


@dataclass(frozen=True, slots=True)
class _Places:
    kept: list[Wanted]  # has a place, or gets one
    rest: list[Wanted]  # may stay while nobody needs its place
    giving_way: set[str]  # of the rest, loaded, and its place is needed


def _share_out(desired: Sequence[Wanted], observed: Observed) -> _Places:
    able = [one for one in desired if not _is_condemned(one, observed)]
    kept, rest = able[: observed.capacity], able[observed.capacity :]
    known = {one.engine_name for one in desired if _is_right(one, observed)}
    coming = sum(one.engine_name not in observed.loaded for one in kept)
    short = coming + len(known) - observed.capacity  # what else is in the engine leaves it in any case
    least = [one.engine_name for one in reversed(rest) if _is_right(one, observed)]
    return _Places(kept, rest, set(least[: max(0, short)]))


def _is_right(one: Wanted, observed: Observed) -> bool:
    return observed.loaded.get(one.engine_name) == one.directory


def _is_ready(one: Wanted, observed: Observed) -> bool:
    row = observed.rows.get(one.engine_name)
    return _is_right(one, observed) and row is not None and row.state is ResidencyState.READY


def _is_condemned(one: Wanted, observed: Observed) -> bool:
    row = observed.rows.get(one.engine_name)
    return row is not None and row.state is ResidencyState.QUARANTINED


def _clear(desired: Sequence[Wanted], places: _Places, observed: Observed) -> list[Action]:
    steps: list[Action] = []
    staying = {one.engine_name for one in desired if _is_right(one, observed)} - places.giving_way
    wanted = {one.engine_name for one in desired}
    for name in observed.loaded:
        row = observed.rows.get(name)
        if name in staying and not (row is not None and row.state is ResidencyState.QUARANTINED):
            continue
        if row is not None and row.state is not ResidencyState.QUARANTINED:
            steps.append(Withdraw(name))
        elif name not in observed.leaving and name not in observed.in_use:
            steps.append(Unload(name))
    for name, row in observed.rows.items():
        if name not in observed.loaded and name not in wanted and row.state is not ResidencyState.QUARANTINED:
            steps.append(Withdraw(name))
    return steps


def _refuse(places: _Places, observed: Observed) -> list[Action]:
    steps: list[Action] = []
    for one in places.rest:
        row = observed.rows.get(one.engine_name)
        is_told = row is not None and row.state is ResidencyState.REFUSED and row.code == NO_ROOM
        if one.engine_name not in observed.loaded and not is_told:
            steps.append(Refuse(one))
    return steps


def _fill(places: _Places, observed: Observed) -> list[Action]:
    probes: list[Action] = []
    loads: list[Wanted] = []
    for one in [*places.kept, *places.rest]:
        name = one.engine_name
        if name in places.giving_way or name in observed.put_off or _is_ready(one, observed):
            continue
        if _is_right(one, observed):
            probes.append(Probe(one))
        elif name not in observed.loaded and one in places.kept:
            loads.append(one)
    loads.sort(key=lambda one: one.engine_name in observed.suspects)
    free = max(0, observed.capacity - len(observed.loaded))
    return [*probes, *(Load(one) for one in loads[:free])]
