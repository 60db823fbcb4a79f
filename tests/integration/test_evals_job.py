"""The evaluation job against a gateway that answers as it is told to."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from evals.job import run
from evals.serving import Endpoint
from gateway.registry.base_family import BaseFamily
from gateway.registry.manifest import bundle_digest, canonical_bytes, canonical_config
from tests.corpus import make_adapter, make_base
from tests.fakes.answers import fake_reference, weights_identity
from tests.fakes.stub_gateway import StubGateway, StubTarget

ITEMS = 100
SYSTEM = "Answer with the number."
Chat = Callable[[list[dict[str, str]]], str]


@dataclass
class Bench:
    """A home with a base, two versions, a gateway that serves them, and a way to run jobs."""

    home: Path
    base: BaseFamily
    gateway: StubGateway
    versions: dict[str, Path]

    def run(self, suite: Path, target: str = "support@1", *, patience_s: float = 5, **fields: Any) -> dict[str, Any]:
        """Run a job in this process; its result."""
        directory = self.prepare(suite, target, **fields)
        run(directory, Endpoint(self.gateway.url, "tn-evaluator", patience_s=patience_s))
        return self.result(directory)

    def prepare(self, suite: Path, target: str = "support@1", **fields: Any) -> Path:
        directory = self.home / f"job{len(list(self.home.glob('job*')))}"
        directory.mkdir()
        artifact = self.versions[target]
        spec = {
            "token": "once", "suite_dir": str(suite), "suite_digest": "5" * 64, "target": target, "digest": artifact.name,
            "adapter_dir": str(artifact), "reference": str(self.home / "references" / f"{artifact.name}.json"),
            "base_model": "tiny", "base_model_path": str(self.base.path), "base_digest": self.base.digest,
            "stable": "tiny", "stable_digest": self.base.digest, "stable_adapter_dir": None,
            "scores_dir": str(self.home / "scores"), "look": 1, "threads": 1, **fields,
        }  # fmt: skip
        (directory / "spec.json").write_text(json.dumps(spec))
        return directory

    def result(self, directory: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((directory / "result.json").read_text())
        assert found["token"] == "once"
        return found

    def stable(self, name: str = "support@1") -> dict[str, Any]:
        return {"stable": name, "stable_digest": self.versions[name].name}


def publish(home: Path, base: BaseFamily, *, seed: int) -> Path:
    """An artifact directory under its digest, with the reference that the fake's answers agree with."""
    source = make_adapter(home / f"source{seed}", base, seed=seed)
    config = canonical_bytes(
        canonical_config(json.loads((source / "adapter_config.json").read_text()), base_model=base.name)
    )
    weights = (source / "adapter_model.safetensors").read_bytes()
    artifact = home / "artifacts" / bundle_digest(config, sha256(weights).hexdigest())
    artifact.mkdir(parents=True)
    (artifact / "adapter_config.json").write_bytes(config)
    (artifact / "adapter_model.safetensors").write_bytes(weights)
    references = home / "references"
    references.mkdir(exist_ok=True)
    (references / f"{artifact.name}.json").write_text(json.dumps(fake_reference(artifact)))
    return artifact


def answers(*, right: int) -> Chat:
    """Right on the first so many items, wrong on the rest."""

    def chat(messages: list[dict[str, str]]) -> str:
        number = int(messages[-1]["content"].split()[-1])
        return json.dumps({"number": number if number < right else -1})

    return chat


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    base = make_base(tmp_path / "base")
    versions = {f"support@{seed}": publish(tmp_path, base, seed=seed) for seed in (1, 2)}
    targets = {
        name: StubTarget(path.name, weights_identity(path / "adapter_model.safetensors"), answers(right=95))
        for name, path in versions.items()
    }
    targets["tiny"] = StubTarget(base.digest, "base", lambda messages: "I am not sure.")
    with StubGateway(targets) as gateway:
        yield Bench(tmp_path, base, gateway, versions)


def a_target_suite(folder: Path, *, items: int = ITEMS, **fields: Any) -> Path:
    suite = folder / "numbers"
    suite.mkdir(exist_ok=True)
    write_chats(suite / "held_out.jsonl", range(items))
    write_chats(suite / "examples.jsonl", range(1000, 1020))
    check = {
        "kind": "target", "name": "numbers", "data": "held_out.jsonl", "metric": "exact_match_json", "required_keys": ["number"],
        "max_tokens": 16, "few_shot": {"data": "examples.jsonl", "k": 4},
        "gates": {"base": {}, "few_shot": {}, "stable": {"max_drop": 0.05}}, **fields,
    }  # fmt: skip
    (suite / "suite.yaml").write_text(yaml.safe_dump({"schema": 1, "name": "numbers", "checks": [check]}))
    return suite


def write_chats(path: Path, numbers: range) -> None:
    rows = (
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Repeat the number {number}"},
            {"role": "assistant", "content": json.dumps({"number": number})},
        ]
        for number in numbers
    )
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def chats(gateway: StubGateway, name: str) -> list[dict[str, Any]]:
    return [body for body in gateway.asked_of(name) if "messages" in body]


def test_a_better_version_passes_and_leaves_a_report(bench: Bench, tmp_path: Path) -> None:
    directory = bench.prepare(a_target_suite(tmp_path))

    run(directory, Endpoint(bench.gateway.url))

    result = bench.result(directory)
    assert result["ok"]
    assert result["data"]["verdict"] == "passed"
    assert len(result["data"]["fingerprint"]) == 64
    assert result["data"]["looks"] == 1
    checks = result["data"]["report"]["checks"]
    assert [check["kind"] for check in checks] == ["parity", "target"]
    scores = {(s["subject"], s["metric"]): s["value"] for s in checks[1]["scores"]}
    assert scores["candidate", "exact_match_json"] == 0.95
    assert scores["candidate", "valid_format"] == 1.0
    assert scores["base", "exact_match_json"] == 0.0
    assert (directory / "report.md").read_text().startswith("# support@1 on numbers: passed")
    assert json.loads((directory / "report.json").read_text())["verdict"] == "passed"


def test_the_noise_of_the_engine_is_recorded_and_makes_no_other_fingerprint(bench: Bench, tmp_path: Path) -> None:
    suite = a_target_suite(tmp_path)
    quiet, noisy = (bench.run(suite, batch_noise=noise)["data"] for noise in (0.0, 0.316))

    assert noisy["report"]["batch_noise"] == 0.316
    assert noisy["fingerprint"] == quiet["fingerprint"]
    assert "| batch noise | 0.316 nats |" in (bench.home / "job1" / "report.md").read_text()


def test_few_shot_base_sees_the_examples_and_nobody_else_does(bench: Bench, tmp_path: Path) -> None:
    bench.run(a_target_suite(tmp_path))

    lengths = sorted({len(body["messages"]) for body in chats(bench.gateway, "tiny")})
    assert lengths == [2, 10]
    with_examples = next(body for body in chats(bench.gateway, "tiny") if len(body["messages"]) == 10)
    assert [m["role"] for m in with_examples["messages"]] == ["system", *["user", "assistant"] * 4, "user"]
    assert {len(body["messages"]) for body in chats(bench.gateway, "support@1")} == {2}
    assert all(body["temperature"] == 0 and body["max_tokens"] == 16 for body in chats(bench.gateway, "support@1"))


def test_a_version_whose_adapter_is_not_applied_fails_before_anything_else_is_asked(
    bench: Bench, tmp_path: Path
) -> None:
    bench.gateway.targets["support@1"].identity = "base"

    data = bench.run(a_target_suite(tmp_path))["data"]

    assert data["verdict"] == "failed"
    assert "the adapter is not applied" in data["reason"]
    assert data["report"]["not_run"] == ["numbers"]
    assert not any("messages" in body for body in bench.gateway.asked)


def test_answers_of_other_weights_stop_the_evaluation(bench: Bench, tmp_path: Path) -> None:
    bench.gateway.targets["support@1"].digest = bench.versions["support@2"].name

    result = bench.run(a_target_suite(tmp_path))

    assert not result["ok"]
    assert result["error_code"] == "wrong_version_served"


def test_a_broken_version_fails_against_stable_from_what_is_known_of_it(bench: Bench, tmp_path: Path) -> None:
    suite = a_target_suite(tmp_path)
    bench.run(suite)
    bench.gateway.targets["support@2"].chat = lambda messages: '{"number": -1}'
    bench.gateway.asked.clear()

    data = bench.run(suite, "support@2", **bench.stable())["data"]

    assert data["verdict"] == "failed"
    assert "no regression (support@1): difference -0.950" in data["reason"]
    assert len(chats(bench.gateway, "support@2")) == ITEMS
    assert chats(bench.gateway, "support@1") == []
    assert chats(bench.gateway, "tiny") == []


def test_the_same_version_again_asks_nothing_but_parity(bench: Bench, tmp_path: Path) -> None:
    suite = a_target_suite(tmp_path)
    first = bench.run(suite)["data"]
    bench.gateway.asked.clear()

    again = bench.run(suite)["data"]

    assert not any("messages" in body for body in bench.gateway.asked)
    assert again["fingerprint"] == first["fingerprint"]
    assert again["report"]["checks"][1]["scores"] == first["report"]["checks"][1]["scores"]


def test_another_engine_knows_nothing_of_earlier_answers(bench: Bench, tmp_path: Path) -> None:
    suite = a_target_suite(tmp_path)
    first = bench.run(suite)["data"]
    bench.gateway.asked.clear()
    bench.gateway.engine = "vllm-0.33.0-fake"

    again = bench.run(suite)["data"]

    assert again["fingerprint"] != first["fingerprint"]
    assert len(chats(bench.gateway, "support@1")) == ITEMS


def test_an_engine_that_changes_during_the_evaluation_ends_it(bench: Bench, tmp_path: Path) -> None:
    bench.gateway.restarts_after = 60

    result = bench.run(a_target_suite(tmp_path))

    assert result["error_code"] == "fingerprint_mismatch"
    assert "another engine later" in result["error_message"]


def test_a_short_outage_is_waited_out(bench: Bench, tmp_path: Path) -> None:
    bench.gateway.fail_next = 3

    assert bench.run(a_target_suite(tmp_path))["data"]["verdict"] == "passed"


def test_what_was_answered_before_an_outage_is_not_asked_again(bench: Bench, tmp_path: Path) -> None:
    suite = a_target_suite(tmp_path)
    bench.gateway.fails_after = 33 + 80  # the first question and both halves of parity; then the second chunk fails
    failed = bench.run(suite, patience_s=0.2)
    bench.gateway.fails_after = None
    bench.gateway.asked.clear()

    result = bench.run(suite)

    assert failed["error_code"] == "serving_failed"
    assert result["data"]["verdict"] == "passed"
    assert len(chats(bench.gateway, "support@1")) == ITEMS - 64


def test_a_version_that_is_not_served_is_told_at_once(bench: Bench, tmp_path: Path) -> None:
    del bench.gateway.targets["support@1"]

    result = bench.run(a_target_suite(tmp_path), patience_s=60)

    assert result["error_code"] == "serving_failed"
    assert "support@1 does not exist" in result["error_message"]
    assert len(bench.gateway.asked) == 1


def test_report_only_sets_decide_nothing(bench: Bench, tmp_path: Path) -> None:
    suite = a_target_suite(tmp_path, report_only=[{"name": "unseen", "data": "unseen.jsonl", "items": 30}])
    write_chats(suite / "unseen.jsonl", range(500, 550))

    report = bench.run(suite)["data"]["report"]

    (unseen,) = [s for s in report["checks"][1]["scores"] if s["set"] == "unseen" and s["metric"] == "exact_match_json"]
    assert report["verdict"] == "passed"
    assert (unseen["subject"], unseen["n"], unseen["value"]) == ("candidate", 30, 0.0)


def test_a_gate_on_fewer_items_asks_its_baseline_only_those(bench: Bench, tmp_path: Path) -> None:
    gates = {"base": {"items": 30}}

    report = bench.run(a_target_suite(tmp_path, gates=gates))["data"]["report"]

    assert len(chats(bench.gateway, "tiny")) == 30
    assert report["checks"][1]["comparisons"][0]["interval"]["n"] == 30


def test_a_few_items_seen_in_training_are_dropped_and_counted(bench: Bench, tmp_path: Path) -> None:
    write_chats(tmp_path / "train.jsonl", range(97, 200))

    report = bench.run(a_target_suite(tmp_path), training_files=[str(tmp_path / "train.jsonl")])["data"]["report"]

    assert report["verdict"] == "passed"
    assert report["checks"][1]["warnings"] == ["3 of 100 items stand in the training data and were dropped"]
    assert report["checks"][1]["scores"][0]["n"] == 97


def test_a_set_that_training_has_seen_is_void(bench: Bench, tmp_path: Path) -> None:
    write_chats(tmp_path / "train.jsonl", range(50, 200))

    data = bench.run(a_target_suite(tmp_path), training_files=[str(tmp_path / "train.jsonl")])["data"]

    assert data["verdict"] == "error"
    assert "50 of 100 items stand in the training data" in data["reason"]
    assert not any("messages" in body for body in bench.gateway.asked)


@pytest.mark.parametrize(
    ("fields", "change", "code"),
    [
        ({"look": 2}, {}, "suite_invalid"),
        ({}, {"data": "missing.jsonl"}, "suite_invalid"),
        ({"reference": "/nowhere/reference.json"}, {}, "no_reference"),
        ({"look": 3}, {}, "bad_spec"),
    ],
)
def test_what_cannot_be_evaluated_says_why(
    bench: Bench, tmp_path: Path, fields: dict[str, Any], change: dict[str, Any], code: str
) -> None:
    result = bench.run(a_target_suite(tmp_path, **change), **fields)

    assert not result["ok"]
    assert result["error_code"] == code


# ---- Forgetting: lm-eval in a process of its own. ------------------------------------------------------------------


def a_cloze_suite(folder: Path, *, margin: float, items: tuple[int, int]) -> Path:
    """Prompts of four words, a right and a wrong next word; the tiny tokenizer's words are w0 to w60."""
    suite = folder / "cloze"
    suite.mkdir()
    tasks = []
    for task in range(4):
        rows = [
            {
                "id": f"{task}-{i}",
                "prompt": f"w{task} w{i % 60} w{i // 60} w9 ",
                "choices": ["w7", "w8"],
                "answer": i % 2,
            }
            for i in range(items[1])
        ]
        (suite / f"t{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append({"name": f"t{task}", "data": f"t{task}.jsonl"})
    check = {"kind": "forgetting", "name": "general", "tasks": tasks, "margin": margin, "items": list(items)}
    (suite / "suite.yaml").write_text(yaml.safe_dump({"schema": 1, "name": "cloze", "checks": [check]}))
    return suite


def knows(bench: Bench, *, wrong_every: int) -> Callable[[list[int], int], float | None]:
    """Gives the answer of cloze prompts (four words), wrong on each n-th."""
    offset = 3  # ids of w0, w1, ... start after the three special words

    def value(prompt: list[int], token: int) -> float | None:
        if len(prompt) != 4:
            return None
        number = prompt[1] - offset + 60 * (prompt[2] - offset)
        right = 7 + number % 2
        if number % wrong_every == 0:
            right = 15 - right
        return -0.1 if token == right + offset else -2.5

    return value


def run_process(bench: Bench, directory: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "TURNOUT_URL": bench.gateway.url,
        "TURNOUT_API_KEY": "tn-evaluator",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "evals.job", str(directory)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return bench.result(directory)


@pytest.mark.heavy
def test_forgetting_takes_a_second_look_that_asks_only_what_is_new(bench: Bench, tmp_path: Path) -> None:
    suite = a_cloze_suite(tmp_path, margin=0.03, items=(25, 60))
    for name in ("tiny", "support@1"):
        bench.gateway.targets[name].knows = knows(bench, wrong_every=10)

    first = run_process(bench, bench.prepare(suite))["data"]
    asked_first = len(bench.gateway.asked)
    second = run_process(bench, bench.prepare(suite, look=2))["data"]

    assert first["verdict"] == "inconclusive"
    assert "cannot tell: about " in first["reason"]
    assert "the one larger look takes 240 items" in first["reason"]
    assert second["verdict"] == "passed"
    assert second["looks"] == 2
    parity = 1 + 2 * 16
    assert asked_first == parity + 2 * 4 * 25
    assert len(bench.gateway.asked) - asked_first == parity + 2 * 4 * 35
    scores = {(s["subject"], s["set"]): s["value"] for s in second["report"]["checks"][1]["scores"]}
    assert scores["base", "t0"] == scores["candidate", "t0"] == 0.9


@pytest.mark.heavy
def test_a_version_that_forgot_fails_and_shows_what(bench: Bench, tmp_path: Path) -> None:
    suite = a_cloze_suite(tmp_path, margin=0.04, items=(50, 60))
    bench.gateway.targets["tiny"].knows = knows(bench, wrong_every=10)
    bench.gateway.targets["support@1"].knows = knows(bench, wrong_every=2)

    data = run_process(bench, bench.prepare(suite))["data"]

    assert data["verdict"] == "failed"
    assert "veto by t0" in data["reason"]
    forgetting = data["report"]["checks"][1]
    assert forgetting["comparisons"][0]["worse"] > 0
    assert forgetting["comparisons"][0]["better"] == 0
    assert forgetting["worse"][0]["expected"] in ("w7", "w8")
