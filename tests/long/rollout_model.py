"""What a route may do, said a second time: a small model to hold the real promotion code against.

It shares nothing with the code that it judges but plain words. It says of a move either why it may be refused (every
reason that holds, so that the order of checks stays free) or what the route is afterwards.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal

BASE = "tiny"
BASE_DIGEST = "b" * 64
Action = Literal["route.promote", "route.rollback", "route.set_variants", "route.set_candidate", "route.set_gates"]


@dataclass(frozen=True)
class MoveBase:
    """What every move says. `expected` is the revision that the mover believes in."""

    route: str
    expected: int | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Promote(MoveBase):
    """All traffic to a version, or to the candidate."""

    target: str | None = None
    force: bool = False
    action: Action = "route.promote"


@dataclass(frozen=True)
class Rollback(MoveBase):
    """All traffic back."""

    to: str | None = None
    force: bool = False
    action: Action = "route.rollback"


@dataclass(frozen=True)
class SetVariants(MoveBase):
    """A split."""

    variants: tuple[tuple[str, int], ...] = ()
    force: bool = False
    action: Action = "route.set_variants"


@dataclass(frozen=True)
class SetCandidate(MoveBase):
    """What comes next."""

    target: str | None = None
    action: Action = "route.set_candidate"


@dataclass(frozen=True)
class SetGates(MoveBase):
    """What must be passed."""

    suites: tuple[str, ...] = ()
    action: Action = "route.set_gates"


Move = Promote | Rollback | SetVariants | SetCandidate | SetGates


@dataclass
class Version:
    """One version of the route's adapter."""

    number: int
    digest: str
    state: str = "received"
    was_stable: bool = False
    is_marked: bool = False


@dataclass
class Route:
    """One route, its versions and its history."""

    name: str
    versions: dict[str, Version] = field(default_factory=dict)
    stable: str = BASE
    previous: str = BASE
    candidate: str | None = None
    variants: tuple[tuple[str, int], ...] = ((BASE, 100),)
    gates: tuple[str, ...] = ()
    revision: int = 1
    moves: int = 0

    def may_return_to(self, name: str) -> bool:
        """Whether traffic may go back there without force."""
        if name == BASE:
            return True
        version = self.versions[name]
        return version.was_stable and version.state == "verified" and not version.is_marked

    @property
    def tried(self) -> list[str]:
        """Arms with a share that came after stable, or never were it."""
        number = 0 if self.stable == BASE else self.versions[self.stable].number
        arms = [target for target, weight in self.variants if weight and target not in (BASE, self.stable)]
        return [arm for arm in arms if self.versions[arm].number > number or not self.versions[arm].was_stable]

    def only_withdraws(self, move: Rollback) -> bool:
        """Whether what a rollback takes back is a trial, and stable stays."""
        is_whole = self.stable == BASE or self.versions[self.stable].state == "verified"
        return bool(self.tried) and move.to in (None, self.stable) and is_whole

    def share(self, target: str) -> int:
        """In percent."""
        return dict(self.variants).get(target, 0)

    def older(self, than: str, *, leaving: list[str]) -> str:
        """The next older version that traffic may return to; else base."""
        number = 0 if than == BASE else self.versions[than].number
        fit = {
            version.number: name
            for name, version in self.versions.items()
            if version.number < number and name not in leaving and self.may_return_to(name)
        }
        return fit[max(fit)] if fit else BASE


@dataclass
class World:
    """Routes, engines and verdicts, as somebody who never saw the code would believe them to be."""

    routes: dict[str, Route] = field(default_factory=dict)
    ready: dict[str, bool] = field(default_factory=dict)  # replicas
    held: set[tuple[str, str]] = field(default_factory=set)  # (replica, version) that is READY there
    suites: dict[str, str] = field(default_factory=dict)  # name -> digest now
    verdicts: dict[tuple[str, str, str, str], str] = field(default_factory=dict)  # newest one

    def copy(self) -> World:
        """Another world that goes its own way."""
        return copy.deepcopy(self)

    def is_held(self, target: str) -> bool:
        """Whether every ready engine answers it."""
        return target == BASE or all((name, target) in self.held for name, is_ready in self.ready.items() if is_ready)

    # ---- May it?

    def refusals(self, move: Move) -> set[str]:
        """Every reason to refuse the move now; none: it must be done."""
        route = self.routes[move.route]
        found = {"route_moved"} if move.expected not in (None, route.revision) else set()
        match move:
            case Promote():
                return found | self._against_promotion(route, move)
            case Rollback():
                return found | self._against_rollback(route, move)
            case SetVariants():
                return found | self._against_split(route, move)
            case SetCandidate():
                return found | (self._against_version(route, move.target) if move.target is not None else set())
            case SetGates():
                return found | ({"suite_not_found"} if any(name not in self.suites for name in move.suites) else set())

    def _against_promotion(self, route: Route, move: Promote) -> set[str]:
        found = {"reason_required"} if move.force and not move.reason else set()
        target = move.target or route.candidate
        if target is None:
            return found | {"no_candidate"}
        found |= {"already_stable"} if target == route.stable else set()
        found |= self._against_version(route, target) | self._against_share(target)
        if target in route.versions and not move.force:
            found |= {"rolled_back"} if route.versions[target].is_marked else set()
            found |= self._against_gates(route, route.versions[target])
        return found

    def _against_rollback(self, route: Route, move: Rollback) -> set[str]:
        found = {"reason_required"} if move.force and not move.reason else set()
        if route.only_withdraws(move):
            return found
        if route.stable == BASE:
            return found | {"nothing_to_roll_back"}
        if move.to is None or move.to == BASE:
            return found
        if move.to == route.stable:
            return found | {"already_stable"}
        found |= self._against_version(route, move.to)
        version = route.versions.get(move.to)
        if version is not None:
            found |= set() if version.was_stable else {"never_stable"}
            found |= {"rolled_back"} if version.is_marked and not move.force else set()
        return found

    def _against_split(self, route: Route, move: SetVariants) -> set[str]:
        targets = [target for target, _ in move.variants]
        found = {"duplicate_variant"} if len(set(targets)) < len(targets) else set()
        found |= set() if any(weight for _, weight in move.variants) else {"no_weight"}
        found |= {"reason_required"} if move.force and not move.reason else set()
        for target, weight in move.variants:
            if target == BASE:
                continue
            found |= self._against_version(route, target)
            if target in route.versions:
                found |= {"rolled_back"} if route.versions[target].is_marked else set()
                found |= self._against_more(route, target, force=move.force) if weight > route.share(target) else set()
        return found

    def _against_more(self, route: Route, target: str, *, force: bool) -> set[str]:
        """To take share away is never refused; more of it needs what a promotion needs."""
        found, version = self._against_share(target), route.versions[target]
        return found if force or version.was_stable else found | self._against_gates(route, version)

    def _against_version(self, route: Route, target: str) -> set[str]:
        if target not in route.versions:
            return {"not_a_version"}
        return set() if route.versions[target].state == "verified" else {"not_verified"}

    def _against_share(self, target: str) -> set[str]:
        if not any(self.ready.values()):
            return {"no_ready_engine"}
        return set() if self.is_held(target) else {"not_resident"}

    def _against_gates(self, route: Route, version: Version) -> set[str]:
        if not route.gates:
            return {"no_gate"}
        against = BASE_DIGEST if route.stable == BASE else route.versions[route.stable].digest
        found = set()
        for suite in route.gates:
            verdict = self.verdicts.get((version.digest, suite, self.suites[suite], against), "missing")
            found |= set() if verdict == "passed" else {f"gate_{verdict}"}
        return found

    # ---- It did.

    def apply(self, move: Move) -> str:
        """Make a move that nothing speaks against; what it left."""
        route = self.routes[move.route]
        route.revision += 1
        route.moves += 1
        left = route.stable
        match move:
            case Promote():
                target = move.target or route.candidate or ""
                route.previous, route.stable = route.stable, target
                route.candidate = None if route.candidate == target else route.candidate
                self._arrive(route, target)
            case Rollback() if route.only_withdraws(move):
                left = ", ".join(sorted(route.tried))
                self._withdraw(route)
            case Rollback():
                self._roll_back(route, move)
            case SetVariants():
                route.variants = move.variants
            case SetCandidate():
                route.candidate = move.target
            case SetGates():
                route.gates = tuple(dict.fromkeys(move.suites))
        return left

    def _withdraw(self, route: Route) -> None:
        tried = route.tried
        self._mark(route, tried)
        if route.previous in tried:  # else a rollback would have nowhere to go that it says
            route.previous = route.older(route.previous, leaving=[route.stable])
        self._arrive(route, route.stable)

    def _roll_back(self, route: Route, move: Rollback) -> None:
        target = move.to or route.previous
        if move.to is None and not route.may_return_to(target):
            target = route.older(target, leaving=[route.stable])
        left = [name for name in (route.stable, *route.tried) if name != target]
        self._mark(route, [*left])
        route.candidate = None if route.candidate == target else route.candidate
        route.stable, route.previous = target, route.older(target, leaving=left)
        self._arrive(route, target)

    def _mark(self, route: Route, left: list[str]) -> None:
        for name in left:
            route.versions[name].is_marked = True
        route.candidate = None if route.candidate in left else route.candidate

    def _arrive(self, route: Route, target: str) -> None:
        route.variants = ((target, 100),)
        if target == BASE:
            return
        route.versions[target].was_stable, route.versions[target].is_marked = True, False
