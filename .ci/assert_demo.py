"""Fail unless the demo's report holds every expected row and every target in it is met. How long it took decides nothing."""

import json
import sys
from pathlib import Path

EXPECTED = {
    "exact_match_base",
    "exact_match_few_shot",
    "exact_match_tuned",
    "exact_match_tuned_unseen_phrasings",
    "valid_format_base",
    "valid_format_tuned",
    "gate_v1",
    "gate_v2",
    "unsticky_users",
    "share_v1",
    "failed_requests",
    "wrong_version_answers",
    "rollback_loads",
    "rollback_ms",
    "wall_s",
}


def main(path: Path) -> int:
    """Check the report; print what is missing or missed."""
    rows = {row["metric"]: row for row in json.loads(path.read_text())["rows"]}
    missing = sorted(EXPECTED - rows.keys())
    missed = [
        f"{name} = {row['value']} (target {row['target']})" for name, row in rows.items() if row["holds"] is False
    ]
    limits = {
        "exact_match_base": lambda v: v <= 0.2,
        "exact_match_tuned": lambda v: v >= 0.85,
        "gate_v1": lambda v: v == "passed",
        "gate_v2": lambda v: v == "failed",
        "unsticky_users": lambda v: v == 0,
        "share_v1": lambda v: v is not None and 0.1 <= v <= 0.9,
        "failed_requests": lambda v: v == 0,
        "wrong_version_answers": lambda v: v == 0,
        "rollback_loads": lambda v: v == 0,
    }
    missed += [
        f"{name} = {rows[name]['value']}"
        for name, holds in limits.items()
        if name in rows and (rows[name]["value"] is None or not holds(rows[name]["value"]))
    ]
    for line in [*(f"missing: {name}" for name in missing), *(f"missed: {line}" for line in missed)]:
        sys.stdout.write(line + "\n")
    sys.stdout.write("demo report holds\n" if not missing and not missed else "demo report does not hold\n")
    return 1 if missing or missed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
