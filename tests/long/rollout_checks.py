"""The state that the real promotion code left, beside what the model says, and the rules that hold whatever it says."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from typing import Any

from gateway.database import Database, sqlite_file
from gateway.rollouts.models import Moved, RouteMoved
from gateway.settings import Settings

from .rollout_model import BASE, Move, Route, World

ACTORS = ("alice", "bob")


class Disagreement(AssertionError):
    """The code and the model part."""


@dataclass
class Checked:
    """A state and the model of it."""

    settings: Settings
    databases: list[Database]
    model: World = field(default_factory=World)

    def __post_init__(self) -> None:
        file = sqlite_file(self.settings.database)
        assert file is not None
        self.reader = sqlite3.connect(file, isolation_level=None)
        self.reader.row_factory = sqlite3.Row

    def matches(self, world: World) -> bool:
        return all(self._difference(route) is None for route in world.routes.values())

    def check(self) -> None:
        for route in self.model.routes.values():
            if difference := self._difference(route):
                raise Disagreement(difference)
            self._check_rules(route)

    def _difference(self, route: Route) -> str | None:
        row = self.reader.execute("SELECT * FROM routes WHERE name = ?", (route.name,)).fetchone()
        variants = tuple((each["target"], each["weight"]) for each in json.loads(row["variants"]))
        gates = tuple(json.loads(row["gates"]))
        tried = tuple(json.loads(row["trial"])["arms"]) if row["trial"] else ()
        found: tuple[Any, ...] = (row["stable"], row["previous"], row["candidate"], variants, tried)
        wanted = (route.stable, route.previous, route.candidate, route.variants, route.tried)
        if found != wanted or (gates, row["revision"]) != (route.gates, route.revision):
            return f"route {route.name} is {found}; the model says {wanted}; {dict(row)}"
        for version in self._versions(route.name):
            known = route.versions[f"{route.name}@{version['version']}"]
            marks = tuple(version[name] is not None for name in ("promoted_at", "gated_at", "rolled_back_at"))
            if marks != (known.was_stable, known.was_gated, known.is_marked):
                return f"{route.name}@{known.number} is (promoted, gated, marked) {marks}; the model says {known}"
        moves = self.reader.execute(
            "SELECT count(*) FROM audit WHERE subject = ? AND action != 'route.create'", (route.name,)
        ).fetchone()[0]
        return None if moves == route.moves else f"{moves} audit rows of {route.name} for {route.moves} moves"

    def _versions(self, adapter: str) -> list[sqlite3.Row]:
        return self.reader.execute("SELECT * FROM adapter_versions WHERE adapter = ?", (adapter,)).fetchall()

    def _check_rules(self, route: Route) -> None:
        """What holds of every route at all times, whatever the model thinks."""
        row = self.reader.execute("SELECT * FROM routes WHERE name = ?", (route.name,)).fetchone()
        marked = {f"{route.name}@{v['version']}" for v in self._versions(route.name) if v["rolled_back_at"]}
        variants = json.loads(row["variants"])
        if {row["stable"], row["previous"]} & marked:
            raise Disagreement(f"{route.name} points at a version that was rolled back: {dict(row)}")
        if sum(each["weight"] for each in variants) != 100:
            raise Disagreement(f"the shares of {route.name} are {variants}")
        if not set(json.loads(row["trial"] or '{"arms": []}')["arms"]) <= {
            v["target"] for v in variants if v["weight"]
        }:
            raise Disagreement(f"{route.name} tries what has no share: {dict(row)}")
        if row["stable"] == row["previous"] != BASE:
            raise Disagreement(f"{route.name} would roll back to where it is: {row['stable']}")

    def check_answer(self, move: Move, moved: Moved | RouteMoved | None, left: str) -> None:
        """The answer, and the audit row that came with it."""
        route = self.model.routes[move.route]
        rows = self.reader.execute("SELECT * FROM audit WHERE subject = ?", (route.name,)).fetchall()
        entries = [row for row in rows if json.loads(row["after"]).get("revision") == route.revision]
        if len(entries) != 1:
            raise Disagreement(f"{move} left {len(entries)} audit rows")
        [entry] = entries
        before, after = json.loads(entry["before"]), json.loads(entry["after"])
        told = (entry["action"], entry["actor"], entry["reason"], after.get("force", False))
        wanted = (move.action, f"key:{ACTORS[0]}", move.reason, getattr(move, "force", False))
        if told != wanted or before["revision"] + 1 != after["revision"] or after["stable"] != route.stable:
            raise Disagreement(f"{move} is recorded as {dict(entry)}")
        if not isinstance(moved, Moved):
            return
        told_left = ", ".join(sorted(moved.moved_from.split(", ")))
        if (told_left, moved.moved_to, moved.revision) != (left, route.stable, route.revision):
            raise Disagreement(f"{move} answered {moved}")
        if moved.needs_load == self.model.is_held(route.stable):
            raise Disagreement(f"{move} says needs_load={moved.needs_load}, engines hold {self.model.held}")
