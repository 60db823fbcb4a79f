from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from gateway.cli import hoist
from gateway.cli_console import ExitCode, Patience, plain, poll, size, table, verdict_exit
from gateway.cli_routes import parse_variant


def turnout(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "TERM": "dumb", "COLUMNS": "200"}
    argv = [sys.executable, "-m", "gateway.cli", *arguments]
    return subprocess.run(argv, env=path | environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["routes", "list", "--json"], ["--json", "routes", "list"]),
        (["jobs", "show", "j", "--url", "http://h", "--json"], ["--url", "http://h", "--json", "jobs", "show", "j"]),
        (["status", "--api-key=k"], ["--api-key=k", "status"]),
        (["chat", "support", "--", "--json"], ["chat", "support", "--", "--json"]),
        (["status", "--url"], ["--url", "status"]),
    ],
)
def test_shared_options_may_stand_anywhere(given: list[str], expected: list[str]) -> None:
    assert hoist(given) == expected


@pytest.mark.parametrize(("text", "expected"), [("support@1=50", ("support@1", 50)), ("base=0", ("base", 0))])
def test_reads_a_variant(text: str, expected: tuple[str, int]) -> None:
    assert parse_variant(text) == expected


@pytest.mark.parametrize("text", ["support@1", "=50", "support@1=", "support@1=-5", "support@1=half"])
def test_refuses_a_variant_without_a_weight(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="TARGET=WEIGHT"):
        parse_variant(text)


@pytest.mark.parametrize(
    ("verdict", "code"),
    [
        ("passed", ExitCode.OK),
        ("failed", ExitCode.FAILED),
        ("error", ExitCode.FAILED),
        ("inconclusive", ExitCode.UNDECIDED),
    ],
)
def test_a_verdict_is_an_exit_code(verdict: str, code: ExitCode) -> None:
    assert verdict_exit(verdict) is code


def test_nothing_in_a_table_is_read_as_markup() -> None:
    console = Console(width=80, record=True, file=io.StringIO())

    console.print(table(None, ("REASON",), [("[red]no[/red] [bad_config]",), (None,)]))

    assert "[red]no[/red] [bad_config]" in console.export_text()


def test_polling_ends_with_what_was_found_or_with_the_time() -> None:
    found = iter([None, None, "here"])

    assert poll(lambda: next(found), every_s=0) == "here"
    assert poll(lambda: None, every_s=0, patience=Patience(0, 1000)) is None


def test_patience_lasts_as_long_as_something_moves() -> None:
    signs = iter(range(50))
    patience = Patience(None, unchanged_s=0.02)

    def look() -> None:
        patience.saw(next(signs, 50))

    assert poll(look, every_s=0.001, patience=patience) is None
    assert next(signs, None) is None
    assert patience.why == "nothing moved for 0 s"


@pytest.mark.parametrize(
    ("count", "text"), [(10, "10 B"), (2048, "2.0 KiB"), (5 * 2**30, "5.0 GiB"), (9000 * 2**30, "9000.0 GiB")]
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert size(count) == text


def test_plain_keeps_text_and_opens_lists() -> None:
    assert plain({"a": ["b", ("c",)], "d": None}) == {"a": ["b", ["c"]], "d": None}


def test_help_lists_every_command() -> None:
    done = turnout("--help")

    assert done.returncode == 0
    commands = "serve doctor data train publish adapters routes promote rollback eval suite jobs keys audit chat status"
    assert [name for name in commands.split() if f" {name} " not in done.stdout] == []


def test_wrong_usage_exits_with_2_and_names_the_argument() -> None:
    done = turnout("promote")

    assert done.returncode == 2
    assert "Missing argument" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_server_is_one_sentence_and_exit_1() -> None:
    done = turnout("routes", "list", TURNOUT_URL="http://127.0.0.1:9")

    assert done.returncode == 1
    assert "turnout serve" in done.stderr
    assert "no_server" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_is_json_when_json_was_asked_for() -> None:
    done = turnout("routes", "list", "--json", TURNOUT_URL="http://127.0.0.1:9")

    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "no_server"


def test_bad_settings_are_a_sentence_that_names_them() -> None:
    done = turnout("doctor", TURNOUT_PORT="eighty", TURNOUT_HOME="/nonexistent/home")

    assert done.returncode == 1
    assert "port" in done.stderr
    assert "eighty" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fault_of_ours_shows_no_traceback_unless_asked(tmp_path: Path) -> None:
    broken = tmp_path / "turnout.yaml"
    broken.mkdir()  # a folder where a file should be: nobody thought of that

    done = turnout("doctor", TURNOUT_HOME=str(tmp_path))

    assert "Traceback" not in done.stdout + done.stderr


def test_data_check_names_the_lines_and_exits_1(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows.write_text(json.dumps(good) + "\n{not json\n")

    done = turnout("data", "check", str(rows))

    assert done.returncode == 1
    assert "line 2" in done.stdout
    assert "Not fit" in done.stdout


def test_data_check_as_json_is_one_document(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(12)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in good))

    done = turnout("data", "check", str(rows), "--json")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["is_valid"] is True


def test_serve_without_a_base_model_says_how_to_get_one(tmp_path: Path) -> None:
    done = turnout("serve", "--home", str(tmp_path / "home"), "--base-model-path", str(tmp_path / "none"))

    assert done.returncode == 1
    assert "make base-model" in done.stderr
