from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.demo.data import make_demo_data
from deploy.demo.report import TARGETS, Value, as_table, make_rows, missed, write_report
from deploy.demo.speaker import KnownAnswers, Spoken, distance
from deploy.demo.stopping import running_in
from deploy.demo.suite import NAME, write_suite
from deploy.demo.traffic import (
    Answer,
    Email,
    by_version,
    is_contradicted,
    learn,
    read_emails,
    share_of,
    unsticky_users,
    watch_switch,
)
from evals.config import load_suite, suite_file

RIGHT = {"intent": "track", "order": "AB-123", "product": "oak lamp", "urgency": "low"}
EMAIL = Email(0, ({"role": "user", "content": "Where is it?"},), RIGHT)
OLD, NEW = "support@2", "support@1"
ROOT = Path(__file__).resolve().parents[2]


def an_answer(
    version: str = NEW, text: str = "{}", *, sent_at: float = 0.0, done_at: float | None = None, **fields: object
) -> Answer:
    values = {"email": EMAIL, "user": "u", "version": version, "text": text, "digest": "d", "error": None} | fields
    return Answer(sent_at=sent_at, done_at=sent_at + 0.1 if done_at is None else done_at, **values)  # type: ignore[arg-type]


def test_an_answer_is_exact_only_when_every_field_is_right() -> None:
    assert an_answer(text=json.dumps(RIGHT)).is_exact
    assert not an_answer(text=json.dumps(RIGHT | {"urgency": "high"})).is_exact


@pytest.mark.parametrize("text", ["", "null", "[]", "Sure! {}", '{"intent": "track"}'])
def test_an_answer_of_another_form_is_not_valid(text: str) -> None:
    assert an_answer(text=text).parsed is None


def test_a_user_who_met_two_versions_is_counted() -> None:
    seen = [an_answer(NEW, user="a"), an_answer(NEW, user="a"), an_answer(NEW, user="b"), an_answer(OLD, user="b")]

    assert unsticky_users(seen) == 1


def test_a_failed_request_makes_no_user_unsticky() -> None:
    assert unsticky_users([an_answer(NEW), an_answer("", error="boom")]) == 0


def test_the_share_of_a_version_is_of_what_was_answered() -> None:
    seen = [an_answer(NEW), an_answer(OLD), an_answer(OLD), an_answer(OLD), an_answer("", error="boom")]

    assert share_of(NEW, seen) == 0.25
    assert share_of(NEW, [an_answer("", error="boom")]) is None


@pytest.mark.parametrize(
    ("share", "holds"), [(0.0, False), (0.05, False), (0.1, True), (0.5, True), (0.91, False), (None, False)]
)
def test_stickiness_counts_only_when_both_arms_answered(share: float | None, holds: bool) -> None:
    (row,) = [row for row in make_rows({"share_v1": share}, {}) if row.metric == "share_v1"]

    assert (row.holds, row.target) == (holds, "within 0.1 to 0.9")


def a_process(*argv: str, **environment: str) -> subprocess.Popen[bytes]:
    program = "print('up', flush=True); import time; time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *argv], stdout=subprocess.PIPE, env=os.environ | environment
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_only_the_server_and_its_children_are_found_in_a_home(tmp_path: Path) -> None:
    home = str(tmp_path)
    started = {
        "server": a_process("serve", "--home", home),
        "job": a_process(f"{home}/jobs/j/1", TURNOUT_CHILD="x:j.1:1"),
        "reader": a_process("-f", f"{home}/logs/engine-0.log"),
        "other server": a_process("serve", "--home", f"{home}-2"),
        "other child": a_process("/elsewhere/jobs/j/1", TURNOUT_CHILD="y:j.1:1"),
    }
    try:
        found = {process.pid for process in running_in(tmp_path)}
    finally:
        for process in started.values():
            process.kill()
            process.communicate()

    assert {name for name, process in started.items() if process.pid in found} == {"server", "job"}


def said(*tokens: str, seed: int, noise: float = 0.0, noise_seed: int = 0) -> Spoken:
    """Tokens with the log-probabilities of eight likely ones at each place; another seed stands for other weights."""
    weights, rounding = random.Random(seed), random.Random(noise_seed)
    spoken = []
    for token in tokens:
        likely = {name: weights.uniform(-12, -4) for name in "abcdefg"} | {token: -0.2}
        spoken.append((token, {name: value + rounding.uniform(-noise, noise) for name, value in likely.items()}))
    return spoken


GOOD, BAD = said("{", "track", "}", seed=1), said("{", "refund", "}", seed=2)


def known_answers() -> KnownAnswers:
    known = KnownAnswers()
    learn(known, NEW, [an_answer(NEW, spoken=GOOD)])
    learn(known, OLD, [an_answer(OLD, spoken=BAD)])
    return known


@pytest.mark.parametrize(
    ("version", "spoken", "expected"),
    [(NEW, BAD, True), (OLD, GOOD, True), (NEW, GOOD, False), (OLD, BAD, False), (NEW, (), False)],
)
def test_an_answer_near_another_versions_contradicts_its_headers(version: str, spoken: Spoken, expected: bool) -> None:
    assert is_contradicted(known_answers(), an_answer(version, spoken=spoken)) is expected


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
def test_the_noise_of_batches_makes_nobody_a_liar_and_hides_none(noise: float) -> None:
    known = known_answers()
    for seed in range(30):
        good = said("{", "track", "}", seed=1, noise=noise, noise_seed=seed)
        bad = said("{", "refund", "}", seed=2, noise=noise, noise_seed=seed)

        assert not is_contradicted(known, an_answer(NEW, spoken=good))
        assert is_contradicted(known, an_answer(NEW, spoken=bad))


def test_a_word_that_noise_turned_is_still_from_the_same_version() -> None:
    """Two words were nearly as likely; after the turn the texts have nothing in common, and nothing is concluded from them."""
    close = {"track": -0.69, "status": -0.70, "x": -9.0, "y": -9.5, "z": -8.0}
    turned = {"track": -0.72, "status": -0.66, "x": -9.1, "y": -9.4, "z": -8.1}
    known = KnownAnswers()
    learn(known, NEW, [an_answer(NEW, spoken=[("{", {"{": -0.1, "x": -7.0}), ("track", close), *GOOD])])
    learn(known, OLD, [an_answer(OLD, spoken=BAD)])

    answer = an_answer(NEW, spoken=[("{", {"{": -0.1, "x": -7.1}), ("status", turned), *BAD])

    assert not is_contradicted(known, answer)


def test_a_prompt_to_which_versions_say_the_same_tells_nothing() -> None:
    known = KnownAnswers()
    for version in (OLD, NEW):
        learn(known, version, [an_answer(version, spoken=GOOD)])

    assert known.tells_apart([EMAIL.number]) == []
    assert known_answers().tells_apart([EMAIL.number, 99]) == [EMAIL.number]
    assert not is_contradicted(known, an_answer(OLD, spoken=GOOD))


def test_answers_are_compared_up_to_the_word_where_they_part() -> None:
    same, parted = said("a", "b", "c", seed=1), said("a", "d", "c", seed=1)

    assert distance(same, same) == 0.0
    assert distance([*same, ("e", {"e": 0.0})], same) == 0.0
    assert distance(same, [*parted[:2], ("c", {"c": -30.0, "q": 0.0})]) == distance(same[:2], parted[:2])


def test_a_clean_switch_has_no_wrong_answer() -> None:
    flow = [an_answer(OLD, spoken=BAD, sent_at=9.9, done_at=10.3), an_answer(NEW, spoken=GOOD, sent_at=10.2)]

    switch = watch_switch(flow, old=OLD, started_at=10.0, completed_at=10.1, known=known_answers())

    assert switch.wrong == ()
    assert switch.took_ms == pytest.approx(100)
    assert switch.last_old_answer_ms == pytest.approx(300)


def test_a_request_sent_after_the_switch_and_answered_by_the_old_version_is_wrong() -> None:
    flow = [an_answer(OLD, spoken=BAD, sent_at=10.5)]

    switch = watch_switch(flow, old=OLD, started_at=10.0, completed_at=10.1, known=known_answers())

    assert switch.wrong == tuple(flow)
    assert switch.took_ms == pytest.approx(500)


def test_headers_that_name_the_new_version_over_the_old_ones_text_are_wrong() -> None:
    flow = [an_answer(NEW, spoken=BAD, sent_at=10.5)]

    switch = watch_switch(flow, old=OLD, started_at=10.0, completed_at=10.1, known=known_answers())

    assert switch.wrong == tuple(flow)


def test_the_table_counts_arms_and_failures() -> None:
    table = by_version(
        [an_answer(NEW, json.dumps(RIGHT)), an_answer(NEW), an_answer("", error="boom"), an_answer(OLD)], "arms"
    )

    assert table.row_count == 3


def test_a_figure_that_was_not_measured_does_not_hold() -> None:
    rows = {row.metric: row for row in make_rows({}, {})}

    assert rows["gate_v1"].holds is False
    assert rows["exact_match_few_shot"].holds is None


def test_holds_when_every_target_is_met_and_names_what_is_missed(tmp_path: Path) -> None:
    good: dict[str, Value] = {
        name: 0 if target is None else target[0] if isinstance(target, tuple) else target
        for name, (_, _, target) in TARGETS.items()
    }

    assert missed(make_rows(good, {"train_v1": 1.5})) == []
    assert missed(make_rows(good | {"rollback_loads": 1}, {})) == ["rollback_loads = 1 (target <= 0)"]

    write_report(tmp_path / "report.json", make_rows(good, {"train_v1": 1.5}))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.keys() == {"date", "machine", "versions", "rows"}
    assert report["rows"][-1] == {
        "metric": "seconds_train_v1",
        "value": 1.5,
        "unit": "s",
        "target": None,
        "holds": None,
        "reference": 199,
    }
    assert as_table(make_rows(good, {})).row_count == len(TARGETS)


def test_no_time_is_promised() -> None:
    assert {name: target for name, (unit, _, target) in TARGETS.items() if unit in ("s", "ms") and target} == {}


SLOW_AND_RIGHT: dict[str, Value] = {
    "exact_match_base": 0.0, "exact_match_few_shot": 0.0, "exact_match_tuned": 0.95, "valid_format_base": 0.0,
    "exact_match_tuned_unseen_phrasings": 0.8, "valid_format_tuned": 1.0, "gate_v1": "passed", "gate_v2": "failed",
    "unsticky_users": 0, "share_v1": 0.5, "failed_requests": 0, "wrong_version_answers": 0, "rollback_loads": 0,
    "rollback_ms": 9_000.0, "wall_s": 13_750.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("figures", "code"),
    [({}, 0), ({"wrong_version_answers": 1}, 1), ({"rollback_loads": 1}, 1), ({"exact_match_tuned": None}, 1)],
)
def test_ci_asserts_what_must_hold_and_never_how_long_it_took(
    tmp_path: Path, figures: dict[str, Value], code: int
) -> None:
    rows = make_rows(SLOW_AND_RIGHT | figures, {"train_v1": 3_430.0, "ready": 900.0})
    write_report(tmp_path / "report.json", rows)

    argv = [sys.executable, str(ROOT / ".ci" / "assert_demo.py"), str(tmp_path / "report.json")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)

    assert (len(missed(rows)) > 0) is (code == 1)
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""


def test_the_suite_loads_and_its_data_is_there(tmp_path: Path) -> None:
    data = make_demo_data(tmp_path / "data", 0)

    suite = load_suite(write_suite(tmp_path / "suites", data))

    assert suite.name == NAME
    assert [check.kind for check in suite.ordered] == ["parity", "target", "forgetting"]
    for check in suite.checks:
        for name in [task.data for task in getattr(check, "tasks", ())] + (
            [check.data] if check.kind == "target" else []
        ):
            assert suite_file(tmp_path / "suites" / NAME, name).is_file()


def test_reads_requests_with_their_answers(tmp_path: Path) -> None:
    data = make_demo_data(tmp_path / "data", 0)

    emails = read_emails(data.heldout, 3)

    assert [email.number for email in emails] == [0, 1, 2]
    assert emails[0].messages[-1]["role"] == "user"
    assert emails[0].expected.keys() == RIGHT.keys()
