from pathlib import Path
from typing import Any

import pytest
import yaml

from evals.config import load_suite, suite_file
from evals.errors import SuiteInvalid

TARGET: dict[str, Any] = {"kind": "target", "name": "emails", "data": "held_out.jsonl", "gates": {"base": {}}}
CLOZE: dict[str, Any] = {
    "kind": "forgetting", "name": "general", "margin": 0.04, "items": [80, 140],
    "tasks": [{"name": "facts", "data": "facts.jsonl"}],
}  # fmt: skip


def a_suite(folder: Path, *checks: dict[str, Any], **fields: Any) -> Path:
    found = folder / "emails"
    found.mkdir()
    (found / "suite.yaml").write_text(yaml.safe_dump({"schema": 1, "name": "emails", "checks": list(checks), **fields}))
    return found


def test_checks_are_ordered_by_cost_and_parity_is_always_there(tmp_path: Path) -> None:
    suite = load_suite(a_suite(tmp_path, CLOZE, TARGET))

    assert [check.kind for check in suite.ordered] == ["parity", "target", "forgetting"]


def test_parity_that_is_declared_is_kept(tmp_path: Path) -> None:
    suite = load_suite(a_suite(tmp_path, TARGET, {"kind": "parity", "max_median_gap": 0.1}))

    (parity,) = [check for check in suite.ordered if check.kind == "parity"]
    assert parity.max_median_gap == 0.1


@pytest.mark.parametrize(("check", "has"), [(TARGET, False), (CLOZE, True)])
def test_only_forgetting_has_a_larger_look(tmp_path: Path, check: dict[str, Any], has: bool) -> None:
    assert load_suite(a_suite(tmp_path, check)).has_larger_look is has


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"gates": {}}, "name at least one of base, few_shot, stable"),
        ({"gates": {"bas": {}}}, r"checks\.0\.target\.gates\.bas: Extra inputs"),
        ({"gates": {"few_shot": {}}}, "needs few_shot"),
        ({"gates": {"stable": {"max_drop": 0}}}, r"max_drop: Input should be greater than 0 \(got 0\)"),
        ({"metric": "bleu"}, r"metric: Input should be .* \(got 'bleu'\)"),
        ({"metric": "valid_format"}, "needs required_keys"),
        ({"data": "/etc/passwd"}, "inside the suite's folder|path inside"),
        ({"data": "../other/held_out.jsonl"}, "path inside"),
        ({"kind": "vibes"}, "vibes"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"report_only": [{"name": "a", "data": "a"}, {"name": "a", "data": "b"}]}, "repeat the name a"),
    ],
)
def test_a_wrong_target_check_is_named(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SuiteInvalid, match=complaint):
        load_suite(a_suite(tmp_path, {**TARGET, **change}))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"items": [140, 80]}, "two growing counts"),
        ({"items": [80]}, "items"),
        ({"tasks": []}, "tasks"),
        ({"tasks": [{"name": "a", "data": "a"}] * 2}, "repeat the name a"),
        ({"margin": 0.9}, "margin"),
        ({"margn": 0.04}, "margn"),
    ],
)
def test_a_wrong_forgetting_check_is_named(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SuiteInvalid, match=complaint):
        load_suite(a_suite(tmp_path, {**CLOZE, **change}))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"schema": 2}, "schema"),
        ({"gate": []}, "gate: Extra"),
        ({"name": "other"}, "make them equal"),
        ({"checks": [TARGET, TARGET]}, "repeat the name emails"),
    ],
)
def test_a_wrong_suite_is_named(tmp_path: Path, fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SuiteInvalid, match=complaint):
        load_suite(
            a_suite(tmp_path, **{"checks": [], **fields}) if "checks" in fields else a_suite(tmp_path, TARGET, **fields)
        )


@pytest.mark.parametrize("text", ["checks: [", "!function evil.run", "- a list", ""])
def test_what_is_no_suite_at_all_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "suite.yaml").write_text(text)

    with pytest.raises(SuiteInvalid, match=r"suite\.yaml"):
        load_suite(tmp_path)


def test_a_missing_suite_is_told(tmp_path: Path) -> None:
    with pytest.raises(SuiteInvalid, match="does not exist"):
        load_suite(tmp_path / "nothing")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "data.jsonl").symlink_to(tmp_path / "secret")

    with pytest.raises(SuiteInvalid, match="leads out"):
        suite_file(folder, "data.jsonl")


def test_a_file_that_is_named_but_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(SuiteInvalid, match=r"suite\.yaml names it"):
        suite_file(tmp_path, "data.jsonl")
