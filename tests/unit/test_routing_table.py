"""The saved routing table: whole, private, and never trusted when it is damaged."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway.database import Database
from gateway.routing import table
from gateway.routing.snapshot import (
    Snapshot,
    SnapshotBase,
    SnapshotKey,
    SnapshotReplica,
    SnapshotRoute,
    SnapshotVersion,
)
from gateway.routing.table import RoutingTable, is_expired, load_saved_snapshot, save_snapshot
from tests.files import note_fsync

MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
BASE = SnapshotBase("tiny", "b" * 64, 64, 128)
SNAPSHOT = Snapshot(
    revision=7,
    bases={"tiny": BASE},
    routes={"s": SnapshotRoute("s", 3, "salt", "s@1", "tiny", None, (("s@1", 90), ("tiny", 10)), "p", MOMENT)},
    versions={
        "s@1": SnapshotVersion(
            "s@1", "s", 1, "d" * 64, "s.v1.dddddddddddd", "verified", "p", frozenset({"key:a"}), True, False, MOMENT
        )
    },
    replicas=(SnapshotReplica("r", "/run/e.sock", "1", "ready", frozenset({"s.v1.dddddddddddd"})),),
    keys={"h" * 64: SnapshotKey("k", "n", "p", frozenset({"inference"}), None)},
)


@pytest.fixture
def routing(tmp_path: Path) -> RoutingTable:
    return RoutingTable(Database("sqlite+aiosqlite://"), tmp_path / "snapshot.json", {"tiny": BASE})


def test_what_is_saved_is_read_back_equal(tmp_path: Path) -> None:
    save_snapshot(SNAPSHOT, tmp_path / "snapshot.json")

    assert load_saved_snapshot(tmp_path / "snapshot.json") == SNAPSHOT


def test_the_file_is_private_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_snapshot(SNAPSHOT, tmp_path / "snapshot.json")
    save_snapshot(SNAPSHOT, tmp_path / "snapshot.json")

    [file] = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"revision": "x"}', b'{"revision": 7, "routes": {"s": {}}}', b"\x00" * 50]
)
def test_a_damaged_file_is_refused_and_counted(routing: RoutingTable, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "snapshot.json").write_bytes(content)

    assert not routing.load_saved()
    assert routing.refused_files == 1
    assert not routing.is_loaded


def test_a_truncated_file_is_refused(routing: RoutingTable, tmp_path: Path) -> None:
    save_snapshot(SNAPSHOT, tmp_path / "snapshot.json")
    content = (tmp_path / "snapshot.json").read_bytes()
    for length in range(0, len(content), 37):
        (tmp_path / "snapshot.json").write_bytes(content[:length])

        assert not routing.load_saved()


def test_a_file_that_is_too_large_is_refused_unread(
    routing: RoutingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_snapshot(SNAPSHOT, tmp_path / "snapshot.json")
    monkeypatch.setattr(table, "MAX_SNAPSHOT_BYTES", 100)

    assert not routing.load_saved()
    assert routing.refused_files == 1


def test_what_a_killed_gateway_left_half_written_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    for pid in (ended.pid, os.getppid()):
        (tmp_path / f"snapshot.json.{pid}.tmp").write_text("{")

    save_snapshot(SNAPSHOT, tmp_path / "snapshot.json")

    assert {path.name for path in tmp_path.iterdir()} == {"snapshot.json", f"snapshot.json.{os.getppid()}.tmp"}


async def test_a_table_that_is_too_large_leaves_the_last_good_file(
    routing: RoutingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_snapshot(SNAPSHOT, tmp_path / "snapshot.json")
    good = (tmp_path / "snapshot.json").read_bytes()
    monkeypatch.setattr(table, "MAX_SNAPSHOT_BYTES", 100)
    routing.current = replace(SNAPSHOT, revision=8)

    await routing.save()

    assert (tmp_path / "snapshot.json").read_bytes() == good
    assert routing.failed_saves == 1


async def test_a_failed_save_is_tried_again_until_it_is_on_disk_and_told_once(
    routing: RoutingTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "gone"
    routing._path = elsewhere / "snapshot.json"
    routing.current = SNAPSHOT
    monkeypatch.setattr(table, "save_pause_s", lambda failures: 0.0)

    for _ in range(3):
        await routing.save()
    assert (routing.failed_saves, capsys.readouterr().out.count("snapshot not saved")) == (3, 1)
    elsewhere.mkdir()
    await routing.save()
    written = routing._path.stat().st_mtime_ns
    await routing.save()

    assert load_saved_snapshot(routing._path) == SNAPSHOT
    assert routing._path.stat().st_mtime_ns == written
    assert routing.failed_saves == 3


async def test_between_tries_it_waits_ever_longer(routing: RoutingTable, tmp_path: Path) -> None:
    routing._path = tmp_path / "gone" / "snapshot.json"
    routing.current = SNAPSHOT

    for _ in range(20):
        await routing.save()

    assert routing.failed_saves == 1
    assert [table.save_pause_s(failures) for failures in (0, 1, 2, 500)] == [0.5, 1.0, 2.0, table.MAX_SAVE_PAUSE_S]


def test_the_new_name_is_flushed_after_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = note_fsync(monkeypatch)
    save_snapshot(SNAPSHOT, tmp_path / "snapshot.json")

    assert ["directory" if path.is_dir() else path.suffix for path in flushed] == [".tmp", "directory"]


def test_without_a_file_there_is_no_table_and_no_alarm(routing: RoutingTable) -> None:
    assert not routing.load_saved()
    assert routing.refused_files == 0


def test_a_loaded_table_serves_the_base_of_this_start_and_not_of_the_one_that_saved_it(
    routing: RoutingTable, tmp_path: Path
) -> None:
    earlier = replace(BASE, digest="e" * 64, max_model_len=32)
    save_snapshot(replace(SNAPSHOT, bases={"tiny": earlier, "older": earlier}), tmp_path / "snapshot.json")

    assert routing.load_saved()

    assert routing.current.bases == {"tiny": BASE}


def test_listeners_hear_of_a_loaded_table(routing: RoutingTable, tmp_path: Path) -> None:
    heard: list[Snapshot] = []
    routing.on_change(heard.append)
    save_snapshot(SNAPSHOT, tmp_path / "snapshot.json")

    assert routing.load_saved()
    assert heard == [SNAPSHOT]


def test_only_ready_replicas_serve_and_only_what_is_ready_on_them() -> None:
    assert [replica.id for replica in SNAPSHOT.serving("s.v1.dddddddddddd")] == ["r"]
    assert SNAPSHOT.serving("s.v2.eeeeeeeeeeee") == []
    assert [replica.id for replica in SNAPSHOT.serving(None)] == ["r"]
    starting = Snapshot(1, replicas=(SnapshotReplica("r", "/s", "1", "testing", frozenset({"x"})),))
    assert starting.serving(None) == starting.serving("x") == []


def test_a_key_expires() -> None:
    moment = datetime.now(UTC)
    made = [SnapshotKey("k", "n", "p", frozenset(), moment + timedelta(seconds=offset)) for offset in (-1, 60)]

    assert [is_expired(key) for key in made] == [True, False]
