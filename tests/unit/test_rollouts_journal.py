"""The journal: on disk before it counts, read whole after any crash."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gateway.errors import Unavailable
from gateway.rollouts.journal import Journal, Pointing, Rollback, Settled
from tests.files import note_fsync

MOMENT = datetime(2026, 1, 2, tzinfo=UTC)


def a_rollback(number: int) -> Rollback:
    before = Pointing(stable="s@2", previous="s@1", candidate=None, variants=(("s@2", 100),))
    after = Pointing(stable="s@1", previous="base", candidate=None, variants=(("s@1", 100),))
    return Rollback(
        id=f"rollback-{number}",
        at=MOMENT,
        actor="key:a",
        reason="v2\nanswers nonsense",
        route="s",
        project_id="p",
        decided_on=number,
        to=None,
        before=before,
        after=after,
        left=("s@2",),
        marks=("s@2",),
    )


def test_what_is_open_is_read_back_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    for number in (1, 2, 3):
        journal.append(a_rollback(number))
    journal.append(Settled(id="rollback-2", at=MOMENT, outcome="applied"))

    for each in (journal, Journal(tmp_path / "j")):
        assert each.open == (a_rollback(1), a_rollback(3))
    assert len((tmp_path / "j").read_bytes().splitlines()) == 4


def test_it_is_private_and_flushed_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = note_fsync(monkeypatch)
    Journal(tmp_path / "j").append(a_rollback(1))

    assert stat.S_IMODE((tmp_path / "j").stat().st_mode) == 0o600
    assert [path.is_dir() for path in flushed] == [False, True]


def test_cut_off_anywhere_the_whole_lines_count_and_more_can_be_added(tmp_path: Path) -> None:
    whole = Journal(tmp_path / "whole")
    whole.append(a_rollback(1))
    first = (tmp_path / "whole").stat().st_size
    whole.append(a_rollback(2))
    content = (tmp_path / "whole").read_bytes()

    for length in range(first, len(content) - 1, 7):
        (tmp_path / "cut").write_bytes(content[:length])
        journal = Journal(tmp_path / "cut")
        assert journal.open == (a_rollback(1),)
        journal.append(a_rollback(3))
        assert Journal(tmp_path / "cut").open == (a_rollback(1), a_rollback(3))


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"kind": "rollback"}', b"\xff\xfe", b'{"kind": "other", "id": "x"}'])
def test_a_damaged_line_is_counted_and_keeps_no_other_from_counting(tmp_path: Path, line: bytes) -> None:
    Journal(tmp_path / "j").append(a_rollback(1))
    with (tmp_path / "j").open("ab") as file:
        file.write(line + b"\n")

    journal = Journal(tmp_path / "j")
    journal.append(a_rollback(2))

    assert journal.refused_lines == 1
    assert Journal(tmp_path / "j").open == (a_rollback(1), a_rollback(2))


def test_what_the_disk_does_not_take_never_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(a_rollback(1))

    def failing(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", failing)
        with pytest.raises(Unavailable, match="No space left"):
            journal.append(a_rollback(2))

    for each in (journal, Journal(tmp_path / "j")):
        assert each.open == (a_rollback(1),)


def test_what_the_disk_takes_in_part_never_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.append(a_rollback(1))
    write = os.write

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:20]))
        with pytest.raises(Unavailable, match="part only"):
            journal.append(a_rollback(2))

    assert Journal(tmp_path / "j").open == (a_rollback(1),)


def test_without_a_file_nothing_is_open_and_none_is_made(tmp_path: Path) -> None:
    assert Journal(tmp_path / "j").open == ()
    assert list(tmp_path.iterdir()) == []
