"""What an attempt leaves behind is read with suspicion."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.jobs import output
from gateway.jobs.output import log_tail, read_progress, read_result, trained
from gateway.jobs.workdir import WorkDirectory


def test_reads_whole_lines_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path)
    work.say("first")
    work.say("second", loss=1.5)
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write('{"at": "2026-01-01T00:00:00Z", "mess')

    offset, lines = read_progress(tmp_path, 0)

    assert [(line.message, line.type) for line in lines] == [("first", "message"), ("second", "metrics")]
    assert lines[1].data == {"loss": 1.5}
    assert read_progress(tmp_path, offset) == (offset, [])


def test_no_progress_yet_is_no_fault(tmp_path: Path) -> None:
    assert read_progress(tmp_path, 0) == (0, [])


def test_nonsense_in_progress_becomes_a_warning(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").write_bytes(b'nonsense\n\xff\n{"message": "no time"}\n')

    _, lines = read_progress(tmp_path, 0)

    assert [line.level for line in lines] == ["warn", "warn", "warn"]


def test_a_line_without_end_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").write_bytes(b"x" * 600_000 + b"\n")
    offset, seen = 0, 0

    while (reached := read_progress(tmp_path, offset))[0] != offset:
        offset, seen = reached[0], seen + len(reached[1])

    assert offset == 600_001
    assert seen == 3


def test_a_result_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    assert read_result(tmp_path) is None

    WorkDirectory(tmp_path).finish("token", ok=True, data={"verdict": "passed"})

    result = read_result(tmp_path)
    assert result is not None
    assert (result.token, result.data) == ("token", {"verdict": "passed"})


def test_a_result_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "result.json").write_text('{"ok": "perhaps"}')
    with pytest.raises(ValueError, match="is not a result"):
        read_result(tmp_path)

    monkeypatch.setattr(output, "MAX_RESULT_BYTES", 10)
    with pytest.raises(ValueError, match="larger than"):
        read_result(tmp_path)


def test_a_result_is_not_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text('{"token": "t", "ok": true}')
    (tmp_path / "result.json").symlink_to(tmp_path / "elsewhere.json")

    with pytest.raises(ValueError, match="cannot be read"):
        read_result(tmp_path)


def test_the_tail_of_a_log_is_fit_to_be_shown(tmp_path: Path) -> None:
    key = "tn-" + "k" * 43
    text = (
        f"\x1b[31mTraceback\x1b[0m\n  File {tmp_path}/jobs/x.py at 0x7f0011223344\n\nkey {key}\nMemoryError: no room\n"
    )
    (tmp_path / "log.txt").write_text("old line\n" * 5_000 + text)

    tail = log_tail(tmp_path, home=tmp_path)

    assert tail.endswith("Traceback | File <home>/jobs/x.py at 0x… | key tn-… | MemoryError: no room")
    assert len(tail) <= 800
    assert log_tail(tmp_path / "absent", home=tmp_path) == ""


def test_who_says_too_much_is_not_listened_to_any_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "MAX_PROGRESS_BYTES", 1_000)
    monkeypatch.setattr(output, "_WINDOW_BYTES", 400)
    work = WorkDirectory(tmp_path)
    for number in range(1_000):
        work.say(f"line {number}")
    offset, said = 0, []

    while (reached := read_progress(tmp_path, offset))[0] != offset:
        offset, lines = reached
        said += [line.message for line in lines]

    assert offset == (tmp_path / "progress.jsonl").stat().st_size
    assert len(said) < 20
    assert said[-1] == "more than 1,000 bytes of progress; the rest is not kept"


def test_what_is_kept_of_a_training_is_of_the_kind_that_is_shown() -> None:
    assert trained({"trained_tokens": "many", "metrics": [1], "extra": 1}) == {"trained_tokens": None, "metrics": {}}
    assert trained({"trained_tokens": True}) == {"trained_tokens": None, "metrics": {}}
    assert trained({"trained_tokens": 5, "metrics": {"loss": 1.0}}) == {"trained_tokens": 5, "metrics": {"loss": 1.0}}
