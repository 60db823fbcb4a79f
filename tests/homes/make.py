"""Use a new home as users do, and write it down as text and small files.

    python -m tests.homes.make tests/homes/X.Y.Z

Runs with the code that it lies beside: see README.md.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from gateway.registry.base_family import BaseFamily
from tests.corpus import make_base, make_bundle

from .rebuild import BASE_MARK, DATABASE, HOME_MARK, KNOWN
from .server import answer_of, printed_key, serving, settings_of, until

# What another start makes anew, or what tells only of the machine.
LEFT_OUT = (DATABASE, "logs", "run", "selftest", "*.lock", "*.journal", "*-journal", "log.txt")


def main(target: Path) -> None:
    """Make the fixture in a folder that is not there yet."""
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base = make_base(scratch / "base")
        settings = settings_of(scratch / "home", scratch / "base")
        settings.prepare_directories()
        (settings.suites_dir / "emails").mkdir()
        (settings.suites_dir / "emails" / "suite.yaml").write_text("name: emails\n")
        orders = give_orders(scratch / "orders", base)
        with serving(settings, orders) as client:
            known = use(client, printed_key(settings), scratch, base)
        write_down(scratch, target)
    (target / KNOWN).write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def give_orders(folder: Path, base: BaseFamily) -> Path:
    """The stand-in trainer leaves a bundle, the stand-in evaluator a verdict that passed."""
    bundle = make_bundle(folder / "bundle", base, adapter="tickets", seed=9, rank=2, alpha=4)
    (folder / "fine_tuning.json").write_text(json.dumps([{"do": "finish", "bundle": str(bundle)}]))
    (folder / "evaluation.json").write_text(json.dumps([{"do": "finish"}]))
    return folder


def use(client: httpx.Client, admin: str, scratch: Path, base: BaseFamily) -> dict[str, Any]:
    """Publish, tune, evaluate, promote, roll back, split; what a later program must still know."""
    client.headers["authorization"] = f"Bearer {admin}"
    made = {name: answer_of(client.post("/api/keys", json={"name": name, "scopes": [name]})) for name in SCOPES}
    answer_of(client.delete(f"/api/keys/{made['preview']['id']}"))
    for seed in (1, 2, 3):
        publish(client, make_bundle(scratch / f"bundle-{seed}", base, seed=seed, rank=2, alpha=4))
    for number in (1, 2, 3):
        wait_loaded(client, f"support/versions/{number}")
    for number in (1, 2):
        move(client, "promote", target=f"support@{number}", force=True)
    move(client, "rollback")
    fine_tune(client)
    evaluate(client, "support@1")
    arms = [{"target": "support@1", "weight": 80}, {"target": "support@3", "weight": 20}]
    body = {"variants": arms, "force": True, "reason": "first users"}
    answer_of(client.put("/api/routes/support/variants", json=body))
    return {
        "keys": {name: made[name]["key"] for name in SCOPES} | {"admin": admin},
        "revoked": ["preview"],
        **{name: answer_of(client.get(path)) for name, path in SEEN.items()},
    }


SCOPES = ("inference", "train", "preview")
# Answers of the program that made the home. A later one may say more, never less.
SEEN = {
    "routes": "/api/routes",
    "adapters": "/api/adapters",
    "versions": "/api/adapters/support",
    "version": "/api/adapters/support/versions/1",
    "tuned": "/api/adapters/tickets",
    "jobs": "/api/jobs",
    "tuning_jobs": "/v1/fine_tuning/jobs",
    "evaluations": "/api/evaluations",
    "files": "/v1/files",
    "audit": "/api/audit",
}


def publish(client: httpx.Client, folder: Path) -> None:
    names = {
        "adapter_config": "adapter_config.json", "adapter_model": "adapter_model.safetensors", "manifest": "manifest.json",
    }  # fmt: skip
    files = {field: (name, (folder / name).read_bytes()) for field, name in names.items()}
    answer_of(client.post("/api/adapters/support/versions", files=files))


def wait_loaded(client: httpx.Client, version: str) -> None:
    def is_loaded() -> bool:
        found = answer_of(client.get(f"/api/adapters/{version}"))
        return any(row["state"] == "ready" for row in found["residency"])

    until(is_loaded, lambda: f"{version} is loaded: {client.get(f'/api/adapters/{version}').text}")


def move(client: httpx.Client, how: str, **body: Any) -> None:
    answer_of(client.post(f"/api/routes/support/{how}", json={"reason": "for the fixture", **body}))


def fine_tune(client: httpx.Client) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(12)
    ]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("train.jsonl", data)}}
    file = answer_of(client.post("/v1/files", **form))  # type: ignore[arg-type]
    body = {"model": "tiny", "training_file": file["id"], "suffix": "tickets"}
    job = answer_of(client.post("/v1/fine_tuning/jobs", json=body))
    wait_over(client, f"/v1/fine_tuning/jobs/{job['id']}", "status")


def evaluate(client: httpx.Client, target: str) -> None:
    job = answer_of(client.post("/api/evaluations", json={"target": target, "suite": "emails"}))
    wait_over(client, f"/api/evaluations/{job['id']}", "state")


def wait_over(client: httpx.Client, path: str, field: str) -> None:
    def is_over() -> bool:
        state = answer_of(client.get(path))[field]
        assert state not in ("failed", "cancelled"), client.get(path).text
        return bool(state == "succeeded")

    until(is_over, lambda: f"{path}: {client.get(path).text}")


def write_down(scratch: Path, target: Path) -> None:
    """The database as SQL, and every other file; the places of home and base as marks."""
    marks = {str(scratch / "home"): HOME_MARK, str(scratch / "base"): BASE_MARK, sys.executable: "python"}
    with closing(sqlite3.connect(scratch / "home" / DATABASE)) as connection:
        text = "\n".join(connection.iterdump()) + "\n"
    (target / "database.sql").write_text(marked(text, marks))
    shutil.copytree(scratch / "base", target / "base")
    shutil.copytree(scratch / "home", target / "home", ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in (target / "home").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        if path.suffix in (".json", ".jsonl", ".md", ".yaml"):
            path.write_text(marked(path.read_text(), marks))


def marked(text: str, marks: dict[str, str]) -> str:
    for place, mark in marks.items():
        text = text.replace(place, mark)
    return text


if __name__ == "__main__":
    main(Path(sys.argv[1]))
