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

    @property
    def asked(self) -> tuple[object, ...]:
        """What makes another call the same."""
        return self.action, self.target


@dataclass(frozen=True)
class Rollback(MoveBase):
    """All traffic back."""

    to: str | None = None
    force: bool = False
    further: bool = False
    accept_load: bool = False
    action: Action = "route.rollback"

    @property
    def asked(self) -> tuple[object, ...]:
        """What makes another call the same."""
        return self.action, self.to


@dataclass(frozen=True)
class SetVariants(MoveBase):
    """A split."""

    variants: tuple[tuple[str, int], ...] = ()
    force: bool = False
    tries: tuple[str, ...] | None = None
    action: Action = "route.set_variants"

    @property
    def asked(self) -> tuple[object, ...]:
        """What makes another call the same."""
        return self.action, self.variants, self.tries


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
    was_gated: bool = False
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
    tried: tuple[str, ...] = ()
    last: str = ""  # the last action that moved traffic
    asked: dict[int, tuple[object, ...]] = field(default_factory=dict)  # what was done on which revision
    gates: tuple[str, ...] = ()
    revision: int = 1
    moves: int = 0

    def may_return_to(self, name: str) -> bool:
        """Whether traffic may go back there without force."""
        if name == BASE:
            return True
        version = self.versions[name]
        return version.was_stable and version.state == "verified" and not version.is_marked

    def goes_to(self, move: Rollback) -> str:
        """Where a rollback that is not refused leads."""
        if self.only_withdraws(move):
            return self.stable
        if move.to is not None or self.may_return_to(self.previous):
            return move.to or self.previous
        return self.older(self.previous, leaving=[self.stable])

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
        ready = [name for name, is_ready in self.ready.items() if is_ready]
        return target == BASE or (bool(ready) and all((name, target) in self.held for name in ready))

    # ---- May it?

    def is_repeat(self, move: Move) -> bool:
        """Whether the same was asked of that revision and done: then it is answered as it was, and nothing moves."""
        if isinstance(move, SetCandidate | SetGates) or move.expected is None:
            return False
        return self.routes[move.route].asked.get(move.expected) == move.asked

    def refusals(self, move: Move) -> set[str]:
        """Every reason to refuse the move now; none: it must be done."""
        route = self.routes[move.route]
        if self.is_repeat(move):
            return {"reason_required"} if getattr(move, "force", False) and not move.reason else set()
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
        if move.to is None and route.last == "route.rollback" and not move.further:
            found |= {"already_rolled_back"}
        if route.stable == BASE and not route.only_withdraws(move):
            return found | {"nothing_to_roll_back"}
        if not (move.accept_load or self.is_held(route.goes_to(move))):
            found |= {"needs_load"} if any(self.ready.values()) else set()
        if route.only_withdraws(move) or move.to is None or move.to == BASE:
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
        found |= {"trial_of_stable"} if route.stable in (move.tries or ()) else set()
        has_share = {target for target, weight in move.variants if weight}
        found |= set() if set(move.tries or ()) <= has_share | {route.stable} else {"trial_without_share"}
        for target, weight in move.variants:
            if target == BASE:
                continue
            found |= self._against_version(route, target)
            if target in route.versions and weight > route.share(target):
                found |= self._against_more(route, target, force=move.force)
        return found

    def _against_more(self, route: Route, target: str, *, force: bool) -> set[str]:
        """To take share away is never refused, nor to give it back to stable; more needs what a promotion needs."""
        found, version = self._against_share(target), route.versions[target]
        if force or target == route.stable:
            return found
        found |= {"rolled_back"} if version.is_marked else set()
        return found if version.was_gated else found | self._against_gates(route, version)

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
        if not isinstance(move, SetCandidate | SetGates):
            route.asked[route.revision] = move.asked
            route.last = move.action
        route.revision += 1
        route.moves += 1
        left = route.stable
        match move:
            case Promote():
                target = move.target or route.candidate or ""
                route.versions[target].was_gated |= not move.force
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
                arms = tuple(target for target, weight in move.variants if weight and target != route.stable)
                route.tried = arms if move.tries is None else move.tries
            case SetCandidate():
                route.candidate = move.target
            case SetGates():
                route.gates = tuple(dict.fromkeys(move.suites))
        return left

    def _withdraw(self, route: Route) -> None:
        tried = list(route.tried)
        self._mark(route, tried)
        if route.previous in tried:  # else a rollback would have nowhere to go that it says
            route.previous = route.older(route.previous, leaving=[route.stable])
        self._arrive(route, route.stable)

    def _roll_back(self, route: Route, move: Rollback) -> None:
        target = route.goes_to(move)
        tried = route.tried if move.to is None else ()
        left = [name for name in (route.stable, *tried) if name != target]
        self._mark(route, [*left])
        route.candidate = None if route.candidate == target else route.candidate
        route.stable, route.previous = target, route.older(target, leaving=left)
        self._arrive(route, target)

    def _mark(self, route: Route, left: list[str]) -> None:
        for name in left:
            if name != BASE:
                route.versions[name].is_marked = True
        route.candidate = None if route.candidate in left else route.candidate

    def _arrive(self, route: Route, target: str) -> None:
        route.variants, route.tried = ((target, 100),), ()
        if target == BASE:
            return
        route.versions[target].was_stable, route.versions[target].is_marked = True, False
