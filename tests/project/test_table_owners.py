"""Each table has one owner. Who else touches it today is named here; nobody joins them, and who leaves is taken off."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from gateway import tables

ROOT = Path(__file__).resolve().parents[2]
TABLES = frozenset(tables.metadata.tables)

# Table: its owner, then the modules that read or write it beside the owner. The list gets shorter, never longer.
OWNERS: dict[str, tuple[str, frozenset[str]]] = {
    "adapters": ("registry.store", frozenset({"jobs.service"})),
    "adapter_versions": (
        "registry.store",
        frozenset({
            "engine.residency_rows", "jobs.service", "proxy.recorder", "registry.retirement", "retention.leftovers",
            "rollouts.carry", "rollouts.conditions", "rollouts.promotion", "routing.census", "routing.table",
        }),
    ),
    "api_keys": ("keys", frozenset({"routing.table"})),
    "audit": ("audit", frozenset({"retention.kinds", "retention.rows"})),
    "exposures": ("proxy.recorder", frozenset({"retention.kinds", "retention.rows"})),
    "files": (
        "datasets.store", frozenset({"jobs.service", "jobs.store", "retention.kinds", "retention.leftovers"}),
    ),
    "job_attempts": ("jobs.store", frozenset({"retention.kinds", "retention.rows"})),
    "job_events": ("jobs.store", frozenset({"jobs.output", "retention.kinds", "retention.rows"})),
    "jobs": (
        "jobs.store",
        frozenset({
            "datasets.store", "engine.residency_rows", "jobs.output", "registry.retirement", "retention.kinds", "retention.leftovers",
            "routing.census", "routing.table",
        }),
    ),
    "leases": ("lease", frozenset()),
    "moves": ("rollouts.calls", frozenset()),
    "processes": ("processes", frozenset()),
    "replicas": (
        "engine.replica_rows",
        frozenset({
            "api.health", "controller", "engine.replicas", "engine.residency_rows", "jobs.residence",
            "rollouts.conditions", "routing.census", "routing.table",
        }),
    ),
    "residency": (
        "engine.residency_rows",
        frozenset({
            "controller", "engine.replica_rows", "jobs.residence", "registry.retirement", "rollouts.conditions",
            "routing.census", "routing.table",
        }),
    ),
    "revisions": ("database", frozenset({"retention.rows", "rollouts.break_glass"})),
    "routes": (
        "routing.store",
        frozenset({"engine.residency_rows", "jobs.service", "registry.retirement", "registry.store", "retention.rows", "routing.table"}),
    ),
    "verdicts": ("jobs.verdicts", frozenset({"jobs.service", "rollouts.conditions", "routing.census"})),
}  # fmt: skip


def touched(source: str) -> set[str]:
    """Tables that a module names: as `tables.jobs`, or imported from `tables`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tables":
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2] == "tables":
            found |= {alias.name for alias in node.names}
    return found & TABLES


def who_touches(root: Path = ROOT) -> dict[str, set[str]]:
    """Modules of the gateway by the table that they name."""
    users: dict[str, set[str]] = defaultdict(set)
    for path in (root / "gateway").rglob("*.py"):
        module = ".".join(path.relative_to(root / "gateway").with_suffix("").parts)
        if module.startswith("migrations") or module == "tables":
            continue
        for table in touched(path.read_text()):
            users[table].add(module)
    return users


def as_lines(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return sorted(f"{module} and {table}" for module, table in pairs)


def test_every_table_has_an_owner_that_uses_it() -> None:
    users = who_touches()

    assert set(OWNERS) == TABLES
    assert [table for table, (owner, _) in OWNERS.items() if owner not in users[table]] == []


def test_nobody_else_touches_a_table_but_those_who_are_named_and_those_do() -> None:
    users = who_touches()
    allowed = {(module, table) for table, (owner, others) in OWNERS.items() for module in {owner, *others}}
    seen = {(module, table) for table, modules in users.items() for module in modules}

    assert as_lines(seen - allowed) == []
    assert as_lines(allowed - seen) == []


def test_a_planted_touch_is_seen() -> None:
    assert touched("from .. import tables\nquery = select(tables.jobs.c.id)") == {"jobs"}
    assert touched("from ..tables import routes, metadata") == {"routes"}
    assert touched("def late():\n    from gateway.tables import verdicts") == {"verdicts"}
