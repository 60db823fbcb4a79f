"""The report on a data file: each fault by line and code, nothing unbounded, and never a crash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.datasets import chat
from gateway.datasets.models import DataReport
from gateway.datasets.validation import check_files, read_rows, validate_file

GOOD = {
    "messages": [{"role": "user", "content": "Where is my order?"}, {"role": "assistant", "content": "On its way."}]
}


def a_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]
    return {"messages": messages} | changes


def written(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def report_of(tmp_path: Path, *rows: Any) -> DataReport:
    return validate_file(written(tmp_path / "data.jsonl", *rows))


def messages(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


ANSWER = ("assistant", "an answer")

ERRORS: list[tuple[str, Any]] = [
    ("not_json", b"{nonsense"),
    ("not_json", b'{"messages": [' + b"[" * 2_000 + b"]" * 2_000 + b"]}"),
    ("not_json", b'{"messages": NaN}'),
    ("not_utf8", b'{"messages": "\xff\xfe"}'),
    ("byte_order_mark", b"\xef\xbb\xbf" + json.dumps(GOOD).encode()),
    ("not_object", b"[1, 2]"),
    ("not_object", b"null"),
    ("no_messages", b"{}"),
    ("no_messages", {"prompt": "p", "completion": "c"}),
    ("messages_not_list", {"messages": "hello"}),
    ("empty_messages", {"messages": []}),
    ("message_not_object", {"messages": ["hello"]}),
    ("unknown_role", messages(("robot", "x"), ANSWER)),
    ("unknown_role", {"messages": [{"content": "x"}]}),
    ("unknown_role", {"messages": [{"role": ["user"], "content": "x"}]}),
    ("null_content", messages(("user", None), ANSWER)),
    ("null_content", {"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}),
    ("empty_content", messages(("user", "  \n"), ANSWER)),
    ("empty_content", messages(("user", "q"), ("assistant", ""))),
    ("content_not_text", messages(("user", [{"type": "image_url"}]), ANSWER)),
    ("special_token", messages(("user", "hi <|im_start|>system"), ANSWER)),
    ("special_token", messages(("user", "q"), ("assistant", "done<|endoftext|>"))),
    ("last_not_assistant", messages(("user", "q"), ANSWER, ("user", "thanks"))),
    ("no_assistant", messages(("system", "s"), ("user", "q"))),
    ("system_not_first", messages(("user", "q"), ("system", "s"), ANSWER)),
    ("tools_unsupported", a_row(tools=[{"type": "function"}])),
    ("tools_unsupported", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": []}]}),
    ("weight_unsupported", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "row"), ERRORS)
def test_names_the_fault_and_its_line(tmp_path: Path, code: str, row: Any) -> None:
    report = report_of(tmp_path, a_row(1), row, a_row(2))

    assert [(finding.line, finding.code) for finding in report.errors] == [(2, code)]
    assert not report.is_valid
    assert (report.rows, report.valid_rows) == (3, 2)


WARNINGS: list[tuple[str, Any]] = [
    ("duplicate_row", a_row(0)),
    ("conflicting_answer", messages(("user", "question 0"), ("assistant", "something else"))),
    ("blank_line", b"   "),
    ("unknown_key", a_row(70, id="x")),
    ("unknown_key", {"messages": [{"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": "a"}]}),
    ("no_user", messages(("assistant", "hello"))),
    ("roles_repeat", messages(("user", "q"), ("user", "q2"), ANSWER)),
    ("long_row", messages(("user", "q" * 20_000), ANSWER)),
]  # fmt: skip


@pytest.mark.parametrize(("code", "row"), WARNINGS)
def test_warns_without_refusing(tmp_path: Path, code: str, row: Any) -> None:
    filler = [a_row(number) for number in range(10)]

    report = report_of(tmp_path, *filler, row)

    assert [(finding.line, finding.code) for finding in report.warnings] == [(11, code)]
    assert report.is_valid


def test_an_assistant_weight_of_one_says_nothing(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]}

    report = report_of(tmp_path, row, *[a_row(number) for number in range(10)])

    assert (report.error_count, report.warning_count) == (0, 0)


def test_counts_all_findings_and_shows_a_bounded_number(tmp_path: Path) -> None:
    report = report_of(tmp_path, *[b"nonsense"] * 500, {"messages": []})

    assert report.error_count == 501
    assert report.counts == {"empty_messages": 1, "not_json": 500}
    assert len(report.errors) == chat.MAX_SHOWN_PER_CODE + 1
    assert report.errors[-1].line == 501
    assert "and 498 more" in report.summary()


def test_an_empty_file_has_no_row(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()

    report = validate_file(tmp_path / "empty.jsonl")

    assert [finding.code for finding in report.errors] == ["no_rows"]
    assert report.error_count == 1


def test_few_rows_are_warned_of(tmp_path: Path) -> None:
    report = report_of(tmp_path, a_row(1), a_row(2))

    assert [finding.code for finding in report.warnings] == ["few_rows"]


def test_reports_digest_size_and_lengths(tmp_path: Path) -> None:
    rows = [
        messages(("system", "be kind"), ("user", "q" * number), ("assistant", "a" * number)) for number in range(1, 101)
    ]

    report = report_of(tmp_path, *rows)

    raw = (tmp_path / "data.jsonl").read_bytes()
    assert (report.digest, report.size_bytes) == (hashlib.sha256(raw).hexdigest(), len(raw))
    lengths = report.statistics.answer_characters
    assert lengths is not None
    assert (lengths.minimum, lengths.median, lengths.p95, lengths.maximum, lengths.total) == (1, 50, 96, 100, 5_050)
    assert report.statistics.roles == {"assistant": 100, "system": 100, "user": 100}
    assert report.statistics.system_prompts == 1
    assert report.statistics.row_tokens is None


def test_counts_tokens_when_it_is_told_how(tmp_path: Path) -> None:
    path = written(
        tmp_path / "data.jsonl", *[a_row(number) for number in range(10)], messages(("user", "w " * 50), ANSWER)
    )

    report = validate_file(
        path, count_tokens=lambda found: sum(len(m["content"].split()) for m in found), max_tokens=20
    )

    assert [(finding.line, finding.code) for finding in report.warnings] == [(11, "too_many_tokens")]
    assert report.statistics.row_tokens is not None
    assert report.statistics.row_tokens.maximum == 52


def test_special_tokens_of_a_tokenizer_are_refused_too(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", messages(("user", "see <repo_name> there"), ANSWER))

    assert validate_file(path).is_valid
    assert [finding.code for finding in validate_file(path, special_tokens=["<repo_name>"]).errors] == ["special_token"]


def test_a_line_over_the_cap_is_read_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_LINE_BYTES", 1_000)
    path = written(tmp_path / "data.jsonl", a_row(1), messages(("user", "x" * 5_000), ANSWER), a_row(2))

    report = validate_file(path)

    assert [(finding.line, finding.code) for finding in report.errors] == [(2, "line_too_long")]
    assert (report.rows, report.valid_rows) == (3, 2)
    assert report.digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_crlf_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(a_row(1)).encode() + b"\r\n" + json.dumps(a_row(2)).encode())

    report = validate_file(path)

    assert (report.valid_rows, report.error_count) == (2, 0)


def test_rows_in_both_files_are_a_warning_while_few(tmp_path: Path) -> None:
    training = written(tmp_path / "train.jsonl", *[a_row(number) for number in range(100)])
    held_out = written(tmp_path / "valid.jsonl", a_row(7), *[a_row(number) for number in range(200, 230)])

    check = check_files(training, held_out)

    assert check.is_valid
    assert check.leaked_rows == 1
    assert [(finding.line, finding.code) for finding in check.leak_warnings] == [(1, "leak")]
    assert "line 8 of the training file" in check.leak_warnings[0].message


def test_rows_in_both_files_are_an_error_once_many(tmp_path: Path) -> None:
    training = written(tmp_path / "train.jsonl", *[a_row(number) for number in range(100)])
    held_out = written(tmp_path / "valid.jsonl", *[a_row(number) for number in range(90, 110)])

    check = check_files(training, held_out)

    assert not check.is_valid
    assert [finding.code for finding in check.leak_errors] == ["leak"]
    assert "10 of 20" in check.leak_errors[0].message


def test_the_trainer_reads_the_good_rows_only(tmp_path: Path) -> None:
    path = written(tmp_path / "data.jsonl", a_row(1), b"nonsense", b"", a_row(2))

    rows = list(read_rows(path))

    assert [line for line, _ in rows] == [1, 4]
    assert rows[0][1] == a_row(1)["messages"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "messages", "weight", "x"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(json_values | st.fixed_dictionaries({"messages": json_values}), max_size=5))
def test_any_json_is_judged_without_a_crash(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("any") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    report = validate_file(path)

    assert report.rows == len(rows)
    assert report.valid_rows == len(list(read_rows(path))) <= report.rows
    assert (report.error_count == 0) == (report.rows > 0 and report.valid_rows == report.rows)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=400))
def test_any_bytes_are_judged_without_a_crash(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "data.jsonl"
    path.write_bytes(raw)

    report = validate_file(path)

    assert report.digest == hashlib.sha256(raw).hexdigest()
    assert report.valid_rows <= report.rows
