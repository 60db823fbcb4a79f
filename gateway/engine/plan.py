"""Which adapters an engine should hold, and the steps that get it there. Pure: reads no clock, no database, no engine."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..registry.models import AdapterVersion, ResidencyState, VersionState
from .models import Resident, Wanted

# Room never grows and bad weights never heal within one start of an engine. Damaged files do.
_SETTLED = (ResidencyState.REFUSED, ResidencyState.QUARANTINED)
DAMAGED = "digest_mismatch"


@dataclass(frozen=True, slots=True)
class RouteTargets:
    """What one route may send traffic to."""

    stable: str
    previous: str
    weighted: tuple[str, ...]
    candidate: str | None


def by_priority(
    versions: Sequence[AdapterVersion], routes: Sequence[RouteTargets], evaluated: Sequence[str]
) -> list[AdapterVersion]:
    """Verified versions, most needed first.

    Routes' stable, then previous (a rollback waits for no load), shares of traffic, candidates; what evaluations wait for;
    what jobs made, newest first; the others, newest first.
    """
    routed = [route.stable for route in routes]
    routed += [route.previous for route in routes]
    routed += [target for route in routes for target in route.weighted]
    routed += [route.candidate for route in routes if route.candidate]
    newest = sorted(versions, key=lambda version: (version.created_at, version.id), reverse=True)
    names = dict.fromkeys(
        [*routed, *evaluated, *(v.name for v in newest if v.job_id is not None), *(v.name for v in newest)]
    )
    known = {version.name: version for version in versions if version.state is VersionState.VERIFIED}
    return [known[name] for name in names if name in known]


@dataclass(frozen=True, slots=True)
class Observed:
    """One look at an engine and at what the gateways believe of it."""

    loaded: Mapping[str, str]  # name -> path, as the engine says
    rows: Mapping[str, Resident]
    ever_loaded: Collection[str]  # since the engine's start, whatever became of them: unloading frees no memory
    capacity: int
    leaving: Collection[str] = ()  # taken from the gateways' table a moment ago
    unreadable: Collection[str] = ()  # their files were damaged, or could not be read, a moment ago


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
    """There is no room for it."""

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
    """All that is to do, cheap steps first, then loads and probes in order of need. Reads no clock."""
    wanted = {one.engine_name: one for one in desired}
    return [*_clear(wanted, observed), *_fill(desired, observed)]


def _is_right(one: Wanted | None, path: str | None) -> bool:
    return one is not None and path == one.directory


def _clear(wanted: Mapping[str, Wanted], observed: Observed) -> list[Action]:
    steps: list[Action] = []
    for name, path in observed.loaded.items():
        if _is_right(wanted.get(name), path):
            continue
        row = observed.rows.get(name)
        if row is not None and row.state is not ResidencyState.QUARANTINED:
            steps.append(Withdraw(name))
        elif name not in observed.leaving:
            steps.append(Unload(name))
    kept = {ResidencyState.QUARANTINED}
    for name, row in observed.rows.items():
        if name not in observed.loaded and name not in wanted and row.state not in kept:
            steps.append(Withdraw(name))
    return steps


def _is_settled(row: Resident | None) -> bool:
    return row is not None and row.state in _SETTLED and row.code != DAMAGED


def _fill(desired: Sequence[Wanted], observed: Observed) -> list[Action]:
    steps: list[Action] = []
    heavy: list[Action] = []
    used = set(observed.ever_loaded) | set(observed.loaded)
    for one in desired:
        row = observed.rows.get(one.engine_name)
        if _is_right(one, observed.loaded.get(one.engine_name)):
            is_known = row is not None and row.state is ResidencyState.READY
            if not is_known and one.engine_name not in observed.unreadable:
                heavy.append(Probe(one))
        elif one.engine_name in observed.loaded or _is_settled(row):
            continue
        elif one.engine_name in used or len(used) < observed.capacity:
            used.add(one.engine_name)  # also of what must wait: its place is kept for when its files are whole
            if one.engine_name not in observed.unreadable:
                heavy.append(Load(one))
        else:
            steps.append(Refuse(one))
    return [*steps, *heavy]
