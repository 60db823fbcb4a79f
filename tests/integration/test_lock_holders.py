"""Who holds the database is told truly: by the kernel, of running and of stopped processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from gateway import lock_holders
from gateway.api import health
from gateway.doctor import examine
from gateway.lock_holders import LockHolder, LockWatch, steady_holders
from gateway.lock_holders import lock_holders as look
from gateway.settings import load_settings
from tests.fakes.stack import Stack, until

HOLDING = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
for statement in sys.argv[2].split(";"):
    connection.execute(statement).fetchone()
print("held", flush=True)
time.sleep(600)
"""
READING = "BEGIN;SELECT * FROM counter"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "state.db"
    with closing(sqlite3.connect(file)) as made:
        made.execute("CREATE TABLE counter (value)")
        made.execute("INSERT INTO counter VALUES (1)")
        made.commit()
    return file


@contextmanager
def holder(file: Path, statements: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    argv = [sys.executable, "-c", HOLDING, str(file), statements, *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("statements", "holds"),
    [
        ("BEGIN EXCLUSIVE", "write"),
        ("BEGIN IMMEDIATE", "write"),
        ("BEGIN;UPDATE counter SET value = 2", "write"),
        (READING, "read"),
        ("PRAGMA journal_mode=WAL;BEGIN IMMEDIATE", "write"),
    ],
)
def test_the_one_who_holds_it_is_named_with_what_it_holds(file: Path, statements: str, holds: str) -> None:
    assert look(file) == []
    with holder(file, statements) as process:
        found = look(file)
        steady = steady_holders(file)

    assert found == steady == [LockHolder(process.pid, "other", holds, is_stopped=False)]  # type: ignore[arg-type]
    assert look(file) == []


@pytest.mark.parametrize(
    ("word", "kind"),
    [("gateway.controller", "controller"), ("gateway.app", "gateway"), ("gateway.cli", "turnout"), ("x", "other")],
)
def test_a_stopped_process_is_told_by_its_kind(file: Path, word: str, kind: str) -> None:
    with holder(file, "BEGIN IMMEDIATE", word) as process:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)

        assert look(file) == [LockHolder(process.pid, kind, "write", is_stopped=True)]  # type: ignore[arg-type]


def test_readers_and_a_writer_are_told_together_and_who_waits_is_not(file: Path) -> None:
    with holder(file, READING) as reader, holder(file, "BEGIN IMMEDIATE") as writer:
        found = look(file) or []

    assert [(each.pid, each.holds) for each in found] == [(writer.pid, "write"), (reader.pid, "read")]


def test_another_file_is_not_taken_for_it(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    other.write_bytes(file.read_bytes())
    with holder(other, "BEGIN EXCLUSIVE"):
        assert look(file) == []


def test_where_the_kernel_does_not_tell_it_says_so(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_holders, "PROC", tmp_path / "nothing")

    assert look(file) is None
    assert steady_holders(file) is None


def test_a_watch_counts_from_the_first_look_and_forgets_who_let_go(file: Path) -> None:
    watch = LockWatch(file)
    with holder(file, "BEGIN IMMEDIATE") as process:
        watch.look()
        [(first, nothing)] = watch.holders
        watch.look()
        [(again, some)] = watch.holders
    watch.look()

    assert first == again == LockHolder(process.pid, "other", "write", is_stopped=False)
    assert (nothing, some > 0) == (0, True)
    assert watch.holders == []


# ---- What people see


def test_doctor_names_the_holder_and_what_to_do_and_blames_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(None, home=tmp_path)
    connect = sqlite3.connect

    def impatient(*arguments: object, **options: object) -> sqlite3.Connection:
        return connect(*arguments, **{**options, "timeout": 0.1})  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(sqlite3, "connect", impatient)
    file = tmp_path / "turnout.db"
    with closing(connect(file)) as made:
        made.execute("CREATE TABLE counter (value)")
    for statements, said in (("BEGIN EXCLUSIVE", "is locked"), ("BEGIN IMMEDIATE", "is sound, but")):
        with holder(file, statements, "gateway.controller") as process:
            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            check = next(check for check in examine(settings) if check.name == "Database")

        assert check.state == "warning"
        assert said in check.found
        assert f"the controller (pid {process.pid}, stopped) holds it to write" in check.found
        assert "kill -CONT" in check.remedy
        assert "restore" not in check.remedy


async def test_readiness_tells_who_holds_the_database_without_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "HELD_LONG_S", 0.1)
    async with Stack(tmp_path) as stack, stack.client(None) as client:
        watch = stack.gateway.services.lock_watch

        async def held_by() -> list[dict[str, object]]:
            found: list[dict[str, object]] = (await client.get("/readyz")).json()["database_held_by"]
            return found

        before = await held_by()
        holding = holder(stack.settings.home / "turnout.db", "BEGIN EXCLUSIVE", "gateway.controller")
        with ExitStack() as ending:
            process = await asyncio.to_thread(
                ending.enter_context, holding
            )  # the gateway goes on, and lets go of its read
            os.kill(process.pid, signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            await until(lambda: any(seconds > 0.1 for _, seconds in watch.holders), timeout_s=30)
            [during] = await held_by()
        await until(lambda: not watch.holders, timeout_s=30)
        await asyncio.to_thread(watch.look)

        assert before == await held_by() == []
        assert during.pop("seen_for_s")
        assert during == {"process": "controller", "holds": "write", "is_stopped": True}
