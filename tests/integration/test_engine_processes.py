"""Children of the controller: found again, ended whole, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from sqlalchemy import delete, update

from gateway import processes, tables
from gateway.database import Database
from gateway.errors import Conflict, Unavailable
from gateway.migrations.run import migrate
from gateway.processes import MAX_LOG_BYTES, ProcessTable, bound_log, group_members, home_marker, look_at
from gateway.settings import Settings

SLEEP = "import time; time.sleep(60)"
# A child that starts two of its own: one in its group, one that leaves for a session of its own.
FAMILY = f"""
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
print("up", flush=True)
time.sleep(60)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


class Home:
    """A home directory and tables over it, each as a controller of its own would have it."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self.settings = settings
        self.database = database
        self.table = self.another()
        self.log = settings.logs_dir / "child.log"

    def another(self) -> ProcessTable:
        return ProcessTable(self.database, home_marker(self.settings.home))

    async def spawn(self, code: str, name: str = "child", *, attempt: int = 1) -> int:
        return await self.table.spawn(
            name,
            kind="job",
            argv=[sys.executable, "-c", code],
            env={"PATH": os.environ["PATH"], "SEEN": "yes"},
            cwd=self.settings.home,
            log=self.log,
            attempt=attempt,
        )

    async def until(self, look: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 20
        while not look():
            assert time.monotonic() < deadline, f"{what}: not in time"
            await asyncio.sleep(0.02)

    async def exited(self, name: str = "child", *, table: ProcessTable | None = None) -> int | None:
        deadline = time.monotonic() + 20
        while (status := await (table or self.table).status(name)).state == "running":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert status.state == "exited"
        return status.exit_code


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    settings = Settings(home=tmp_path / "home")
    settings.prepare_directories()
    await migrate(settings)
    database = Database(settings.database)
    made = Home(settings, database)
    try:
        yield made
    finally:
        await made.table.stop_all(grace_s=0)
        await database.close()


def is_running(pid: int) -> bool:
    seen = look_at(pid)
    return seen is not None and not seen.is_zombie


@pytest.mark.parametrize(("code", "expected"), [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.abort()", -6)])
async def test_reports_how_a_child_ended(home: Home, code: str, expected: int) -> None:
    await home.spawn(code)

    assert await home.exited() == expected


async def test_child_has_exactly_its_environment_and_the_mark(home: Home) -> None:
    await home.spawn("import os; print(sorted(os.environ.items()))")
    await home.exited()

    said = home.log.read_text()

    assert "('SEEN', 'yes')" in said
    assert f"('TURNOUT_CHILD', '{home_marker(home.settings.home)}:child:1')" in said
    assert "HOME" not in said


async def test_unknown_child_is_absent_and_killing_it_is_nothing(home: Home) -> None:
    assert (await home.table.status("nobody")).state == "absent"
    await home.table.kill("nobody")


async def test_refuses_to_start_a_running_child_twice(home: Home) -> None:
    pid = await home.spawn(SLEEP)

    with pytest.raises(Conflict):
        await home.spawn(SLEEP)

    assert is_running(pid)


async def test_program_that_is_not_there_is_said(home: Home) -> None:
    with pytest.raises(Unavailable, match="cannot be started"):
        await home.table.spawn("x", kind="job", argv=["/no/such"], env={}, cwd=home.settings.home, log=home.log)

    assert (await home.table.status("x")).state == "absent"


@pytest.mark.invariant(10)
async def test_kill_ends_the_whole_family(home: Home) -> None:
    pid = await home.spawn(FAMILY)
    await home.until(lambda: home.log.exists() and "up" in home.log.read_text(), "the family is up")
    await home.until(lambda: len(group_members(pid)) == 2, "the child in its group")

    await home.table.kill("child", grace_s=5)

    assert group_members(pid) == []
    assert not marked(home)
    assert (await home.table.status("child")).state == "exited"


@pytest.mark.invariant(10)
async def test_kill_does_not_ask_for_ever(home: Home) -> None:
    pid = await home.spawn(STUBBORN)
    await home.until(lambda: home.log.exists() and "up" in home.log.read_text(), "it ignores SIGTERM")

    await home.table.kill("child", grace_s=0.3)

    assert not is_running(pid)
    assert await home.exited() == -signal.SIGKILL


@pytest.mark.invariant(10)
async def test_kill_reaches_a_group_whose_leader_is_dead(home: Home) -> None:
    pid = await home.spawn(FAMILY)
    await home.until(lambda: len(group_members(pid)) == 2, "the family is up")
    os.kill(pid, signal.SIGKILL)
    await home.exited()
    assert group_members(pid), "its child lives on"

    await home.table.kill("child", grace_s=0)

    assert group_members(pid) == []


@pytest.mark.invariant(10)
async def test_next_controller_adopts_what_runs_and_ends_what_lost_its_leader(home: Home) -> None:
    kept = await home.spawn(SLEEP, "kept", attempt=4)
    broken = await home.spawn(FAMILY, "broken")
    await home.until(lambda: len(group_members(broken)) == 2, "the family is up")
    os.kill(broken, signal.SIGKILL)
    await home.exited("broken")

    after = home.another()
    adopted = await after.adopt()

    assert [(row.id, row.pid, row.attempt) for row in adopted] == [("kept", kept, 4)]
    assert (await after.status("kept")).state == "running"
    assert (await after.status("broken")).state == "absent"
    assert group_members(broken) == []


@pytest.mark.invariant(10)
async def test_exit_of_an_adopted_child_is_seen_without_its_code(home: Home) -> None:
    pid = await home.spawn(SLEEP)
    after = home.another()
    await after.adopt()

    os.kill(pid, signal.SIGKILL)

    assert await home.exited(table=after) is None


@pytest.mark.invariant(10)
async def test_a_child_whose_row_was_never_written_is_found_by_its_mark(home: Home) -> None:
    pid = await home.spawn(SLEEP)
    async with home.database.write() as connection:
        await connection.execute(delete(tables.processes))

    await home.another().adopt()

    assert not is_running(pid)


@pytest.mark.mutant(10)
async def test_without_the_sweep_an_orphan_lives_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: ProcessTable, keep: set[int]) -> None:
        return None

    pid = await home.spawn(SLEEP)
    async with home.database.write() as connection:
        await connection.execute(delete(tables.processes))
    with monkeypatch.context() as patched:
        patched.setattr(ProcessTable, "_sweep", nothing)
        await home.another().adopt()

    assert is_running(pid), "what the test above would find"
    await home.another().adopt()


@pytest.mark.mutant(10)
async def test_without_the_group_the_family_lives_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    async def only_the_leader(group: int, grace_s: float) -> None:
        os.kill(group, signal.SIGKILL)

    pid = await home.spawn(FAMILY)
    await home.until(lambda: len(group_members(pid)) == 2, "the family is up")
    with monkeypatch.context() as patched:
        patched.setattr(processes, "_end_group", only_the_leader)
        await home.table.kill("child", grace_s=0)

    assert group_members(pid), "what the test above would find"
    await home.table.kill("child", grace_s=0)
    assert group_members(pid) == []


async def test_children_of_another_home_are_left_alone(home: Home, tmp_path: Path) -> None:
    pid = await home.spawn(SLEEP)
    other = ProcessTable(home.database, home_marker(tmp_path / "other"))
    async with home.database.write() as connection:
        await connection.execute(delete(tables.processes))

    await other.adopt()

    assert is_running(pid)
    os.killpg(pid, signal.SIGKILL)


async def test_a_pid_that_is_a_strangers_now_is_never_signalled(home: Home) -> None:
    pid = await home.spawn(SLEEP)
    async with home.database.write() as connection:  # the row of an older process that had this pid
        await connection.execute(update(tables.processes).values(started=1.0, id="older"))

    after = ProcessTable(home.database, "another-mark")
    assert (await after.status("older")).state == "exited"
    await after.kill("older", grace_s=0)

    assert is_running(pid)
    os.killpg(pid, signal.SIGKILL)


async def test_a_child_forgotten_before_it_was_reaped_leaves_no_zombie(home: Home) -> None:
    pid = await home.spawn("pass")
    await home.until(lambda: (seen := look_at(pid)) is not None and seen.is_zombie, "the child ends")

    await home.table.forget("child")

    assert look_at(pid) is None


async def test_a_thread_that_ends_late_delays_the_reaping_only(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = await home.spawn("pass")
    await home.until(lambda: (seen := look_at(pid)) is not None and seen.is_zombie, "the child ends")
    with monkeypatch.context() as late:
        late.setattr(os, "waitpid", lambda pid, options: (0, 0))
        await home.table.forget("child")
    assert look_at(pid) is not None

    await home.table.status("another")

    assert look_at(pid) is None


async def test_stop_all_leaves_nothing(home: Home) -> None:
    pids = [await home.spawn(SLEEP, "one"), await home.spawn(FAMILY, "two")]

    await home.another().stop_all(grace_s=2)

    assert not any(is_running(pid) for pid in pids)
    assert not marked(home)
    assert await home.table.children() == []


@pytest.mark.invariant(10)
@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.005, 0.01, 0.02, 0.04])
async def test_a_start_that_is_cancelled_leaves_no_child_without_a_row(home: Home, after_s: float) -> None:
    starting = asyncio.create_task(home.spawn(SLEEP))
    await asyncio.sleep(after_s)

    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)

    rows = {row.pid for row in await home.table.children()}
    await home.until(lambda: set(marked(home)) <= rows, "only what has a row runs")


async def test_a_log_that_grew_too_long_is_put_aside(home: Home) -> None:
    home.log.write_bytes(b"x" * (MAX_LOG_BYTES + 1))

    await home.spawn("print('new')")
    await home.exited()

    assert home.log.read_text() == "new\n"
    assert home.log.with_name("child.log.1").stat().st_size == MAX_LOG_BYTES


async def test_the_log_of_a_child_that_runs_on_is_bounded(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 1000)
    go = home.settings.home / "go"
    await home.spawn(f"import pathlib, time; print('y' * 2000, flush=True)\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)\nprint('more', flush=True)")  # fmt: skip
    await home.until(lambda: home.log.stat().st_size > 1000, "it wrote a lot")

    bound_log(home.log)
    assert home.log.stat().st_size == 0
    assert home.log.with_name("child.log.1").read_text() == "y" * 999 + "\n"
    go.touch()
    await home.exited()

    bound_log(home.log)
    assert home.log.read_text() == "more\n", "what it writes next begins the file anew"


def test_a_log_that_is_gone_short_or_a_link_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 10)
    short, target, link = tmp_path / "short.log", tmp_path / "target", tmp_path / "link.log"
    short.write_text("short")
    target.write_text("somebody else's, and long")
    link.symlink_to(target)

    for path in (short, link, tmp_path / "absent.log"):
        bound_log(path)

    assert short.read_text() == "short"
    assert target.read_text() == "somebody else's, and long"


def test_a_log_is_cut_even_when_no_copy_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "MAX_LOG_BYTES", 10)
    path = tmp_path / "child.log"
    path.write_text("much more than that")
    (tmp_path / ".child.log.tmp").mkdir()  # in the way of the copy, as a full disk is

    bound_log(path)

    assert path.stat().st_size == 0
    assert not path.with_name("child.log.1").exists()


def marked(home: Home) -> list[int]:
    """Living processes with this home's mark."""
    mark = f"TURNOUT_CHILD={home_marker(home.settings.home)}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and is_running(int(entry.name)) and mark in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
