"""The demo's suite: what "better" means for the support adapter, and what it must not forget."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from .data import MAX_TOKENS, Answer, DemoData

NAME = "support-emails"
TARGET = "emails"
UNSEEN = "unseen_phrasings"
METRIC = "exact_match_json"
FORMAT = "valid_format"
BASELINE_ITEMS = 60  # what the base model is asked: enough to tell 0 from 1, and it takes the longest answers
EXAMPLES = 40
GENERAL = Path(__file__).resolve().parents[2] / "evals" / "suites" / "general-cloze"


def write_suite(folder: Path, data: DemoData) -> Path:
    """Write `suite.yaml` and its data into `folder`/`NAME`, as a user would by hand."""
    suite = folder / NAME
    suite.mkdir(parents=True)
    shutil.copyfile(data.heldout, suite / "held_out.jsonl")
    shutil.copyfile(data.unseen, suite / "unseen.jsonl")
    with data.train.open() as rows:
        (suite / "examples.jsonl").write_text("".join(islice(rows, EXAMPLES)))
    text = yaml.safe_dump(_suite(_general(suite)), sort_keys=False, width=100)
    (suite / "suite.yaml").write_text(f"# What a version of the support adapter must pass to be promoted.\n{text}")
    return suite


def _general(suite: Path) -> list[dict[str, Any]]:
    """Checks of the general suite that ships, with its data copied: what any adapter should leave intact."""
    for path in GENERAL.glob("*.jsonl"):
        shutil.copyfile(path, suite / path.name)
    checks = yaml.safe_load((GENERAL / "suite.yaml").read_text())["checks"]
    return [check for check in checks if check["kind"] == "forgetting"]


def _suite(general: list[dict[str, Any]]) -> dict[str, Any]:
    target = {
        "kind": "target",
        "name": TARGET,
        "data": "held_out.jsonl",
        "metric": METRIC,
        "required_keys": list(Answer.model_fields),
        "max_tokens": MAX_TOKENS,
        "few_shot": {"data": "examples.jsonl", "k": 4, "seed": 0},
        "gates": {
            "base": {"min_gain": 0.0, "items": BASELINE_ITEMS},
            "few_shot": {"min_gain": 0.0, "items": BASELINE_ITEMS},
            "stable": {"max_drop": 0.05},
        },
        "report_only": [{"name": UNSEEN, "data": "unseen.jsonl"}],
        "training_overlap": "report",  # the e-mails are made from templates, so held-out ones share wording on purpose
    }
    return {
        "schema": 1,
        "name": NAME,
        "description": "Customer e-mails to JSON: better than base and few-shot base, no worse than stable, nothing forgotten.",
        "checks": [target, *general],
    }
