"""A rollback while the database is locked or gone: traffic follows at once, the database later, and nothing is forgotten."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway import tables
from gateway.errors import Unavailable
from gateway.keys import Keys, load_pepper
from gateway.rollouts import break_glass as module
from gateway.rollouts.journal import Journal, Rollback, Settled
from tests.fakes.stack import BASE, Stack, until
from tests.rollouts_world import (
    FORCED,
    answering,
    audited,
    code,
    pointers,
    promote,
    promoted,
    roll_back,
    split,
)

GLASS = {"break_glass": True, "reason": "v2 answers nonsense"}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        yield running


@pytest.fixture
async def admin(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with stack.client("admin") as client:
        yield client


def database_file(stack: Stack) -> Path:
    return stack.settings.home / "turnout.db"


@asynccontextmanager
async def locked(stack: Stack) -> AsyncIterator[None]:
    """As a process does that was stopped in the middle of a write. The lock is waited for while the gateway goes on."""
    with closing(
        sqlite3.connect(database_file(stack), isolation_level=None, timeout=30, check_same_thread=False)
    ) as other:
        await asyncio.to_thread(other.execute, "BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@asynccontextmanager
async def gone(stack: Stack) -> AsyncIterator[Path]:
    """The file is elsewhere; what happens to it there is what other gateways did meanwhile."""
    file = database_file(stack)
    elsewhere = file.with_suffix(".gone")
    file.rename(elsewhere)
    yield elsewhere
    elsewhere.rename(file)


@asynccontextmanager
async def frozen(stack: Stack) -> AsyncIterator[None]:
    """A process that was stopped after it had begun to write."""
    code = (
        "import sqlite3, sys, time; connection = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "connection.execute('BEGIN IMMEDIATE'); print('begun', flush=True); time.sleep(600)"
    )
    argv = [sys.executable, "-c", code, str(database_file(stack))]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline)
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.kill()


async def told(stack: Stack) -> None:
    """The database knows everything."""
    await until(lambda: stack.gateway.services.break_glass.open == 0, timeout_s=30)


def moved_meanwhile(file: Path, stable: str, variants: list[dict[str, Any]], *, previous: str = BASE) -> None:
    """Another gateway's move."""
    with closing(sqlite3.connect(file)) as other:
        other.execute(
            "UPDATE routes SET revision = revision + 1, stable = ?, previous = ?, variants = ? WHERE name = 'support'",
            (stable, previous, json.dumps(variants)),
        )
        other.execute("UPDATE revisions SET value = value + 1")
        other.commit()


async def marked(stack: Stack) -> set[str]:
    rows = await stack.rows(tables.adapter_versions)
    return {f"{row.adapter}@{row.version}" for row in rows if row.rolled_back_at is not None}


async def notes(stack: Stack) -> list[dict[str, Any]]:
    """What the audit log says of rollbacks that were journalled."""
    rows = await audited(stack, "route.rollback")
    return [
        row.after["break_glass"] | {"reason": row.reason, "actor": row.actor}
        for row in rows
        if "break_glass" in row.after
    ]


@pytest.mark.parametrize("trouble", [locked, frozen, gone])
async def test_traffic_goes_back_at_once_and_the_database_is_told_later(
    stack: Stack, admin: httpx.AsyncClient, trouble: Any
) -> None:
    await promoted(stack, admin, 1, 2)
    revision = (await admin.get("/api/routes/support")).json()["revision"]

    async with trouble(stack):
        answer = await roll_back(admin, **GLASS)
        served = await answering(stack)
        ready = (await admin.get("/readyz")).json()
    await told(stack)

    moved = answer.json()
    assert answer.status_code == 200
    assert (moved["journalled"], moved["moved_from"], moved["moved_to"]) == (True, "support@2", "support@1")
    assert (moved["revision"], moved["needs_load"], served) == (revision + 1, False, "support@1")
    assert ready["journalled_rollbacks"] == 1
    assert (await admin.get("/readyz")).json()["journalled_rollbacks"] == 0
    assert await pointers(admin) == ("support@1", BASE)
    assert (await admin.get("/api/routes/support")).json()["revision"] == revision + 1
    assert await marked(stack) == {"support@2"}
    assert await answering(stack) == "support@1"
    [note] = await notes(stack)
    assert (note["outcome"], note["decided_on"], note["reason"]) == ("applied", revision, GLASS["reason"])
    assert note["actor"].startswith("key:")


async def test_a_gateway_that_starts_without_its_database_goes_by_the_journal(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    await promoted(stack, admin, 1, 2)
    await stack.gateway.table.save()

    async with gone(stack):
        assert (await roll_back(admin, **GLASS)).status_code == 200
        await stack.stop()
        await stack.serve()
        assert await answering(stack) == "support@1"
    await told(stack)

    async with stack.client("admin") as client:
        assert await pointers(client) == ("support@1", BASE)
    assert [note["outcome"] for note in await notes(stack)] == ["applied"]


async def test_without_the_database_too_a_rollback_ends_the_trial(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    await stack.add_version("support", 3)
    arms = [{"target": target, "weight": 1} for target in ("support@2", "support@3", BASE)]
    await split(admin, arms, tries=["support@3"], **FORCED)

    async with gone(stack):
        shown = (await roll_back(admin, **GLASS, dry_run=True)).json()
        assert stack.gateway.services.break_glass.open == 0
        moved = (await roll_back(admin, **GLASS)).json()
        assert await answering(stack) == "support@2"
    await told(stack)

    assert (shown["dry_run"], shown["moved_from"], shown["moved_to"]) == (True, "support@3", "support@2")
    assert (moved["moved_from"], moved["marked"]) == ("support@3", ["support@3"])
    assert moved["before"]["trial"]["arms"] == ["support@3"]
    assert await pointers(admin) == ("support@2", "support@1")
    route = (await admin.get("/api/routes/support")).json()
    assert (route["trial"], route["last_move"]["action"]) == (None, "rollback")
    assert await marked(stack) == {"support@3"}


async def test_a_trial_of_the_base_model_ends_without_the_database_too(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1)
    await split(admin, [{"target": "support@1", "weight": 1}, {"target": BASE, "weight": 1}], **FORCED)

    async with gone(stack):
        moved = (await roll_back(admin, **GLASS)).json()
        assert await answering(stack) == "support@1"
    await told(stack)

    assert (moved["moved_from"], moved["moved_to"]) == (BASE, "support@1")
    assert await pointers(admin) == ("support@1", BASE)
    assert await marked(stack) == set()


async def test_without_the_database_too_it_asks_before_a_second_step_and_before_a_load(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    first, *_ = await promoted(stack, admin, 1, 2, 3)
    await roll_back(admin)
    await stack.unload(first)

    async with gone(stack):
        second_step = await roll_back(admin, **GLASS)
        onto_nothing = await roll_back(admin, **GLASS, further=True)
        assert await answering(stack) == "support@2"
        moved = await roll_back(admin, **GLASS, further=True, accept_load=True)
    await told(stack)

    assert code(second_step) == (409, "already_rolled_back")
    assert code(onto_nothing) == (409, "needs_load")
    assert (moved.json()["moved_to"], moved.json()["needs_load"]) == ("support@1", True)
    assert await pointers(admin) == ("support@1", BASE)


async def test_pressed_again_it_goes_back_once_and_further_only_by_name(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)
    revision = (await admin.get("/api/routes/support")).json()["revision"]

    async with gone(stack):
        first = await roll_back(admin, **GLASS)
        again = [
            await roll_back(admin, **GLASS),
            await roll_back(admin, **GLASS, expected_revision=revision),
            await roll_back(admin, **GLASS, to="support@2"),
        ]
        assert await answering(stack) == "support@2"
        further = await roll_back(admin, **GLASS, to="support@1")
        assert await answering(stack) == "support@1"
        stale = await roll_back(admin, **GLASS, to=BASE, expected_revision=revision)
    await told(stack)

    assert {(each.json()["moved_to"], each.json()["revision"]) for each in (first, *again)} == {
        ("support@2", revision + 1)
    }
    assert further.json()["revision"] == revision + 2
    assert code(stale) == (409, "route_moved")
    assert await pointers(admin) == ("support@1", BASE)
    assert await marked(stack) == {"support@2", "support@3"}
    assert [note["outcome"] for note in await notes(stack)] == ["applied", "applied"]


async def test_what_is_being_tried_is_withdrawn_and_stable_stays(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1)
    await stack.add_version("support", 2)
    arms = [{"target": "support@1", "weight": 90}, {"target": "support@2", "weight": 10}]
    assert (await admin.put("/api/routes/support/variants", json={"variants": arms, **FORCED})).status_code == 200

    async with locked(stack):
        moved = (await roll_back(admin, **GLASS)).json()
    await told(stack)

    assert (moved["moved_from"], moved["moved_to"]) == ("support@2", "support@1")
    assert await pointers(admin) == ("support@1", BASE)
    assert await marked(stack) == {"support@2"}


# ---- The route moved meanwhile


async def test_what_was_left_is_taken_out_again_whoever_moved_the_route(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    await stack.add_version("support", 3, is_promoted=True)

    async with gone(stack) as file:
        assert (await roll_back(admin, **GLASS)).status_code == 200
        split = [{"target": "support@3", "weight": 50}, {"target": "support@2", "weight": 50}]
        moved_meanwhile(file, "support@3", split, previous="support@2")
    await told(stack)

    assert await pointers(admin) == ("support@3", "support@1")
    assert await marked(stack) == {"support@2"}
    assert [note["outcome"] for note in await notes(stack)] == ["applied"]


async def test_a_later_move_to_something_else_stands_and_is_told(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    await stack.add_version("support", 3, is_promoted=True)

    async with gone(stack) as file:
        assert (await roll_back(admin, **GLASS)).status_code == 200
        moved_meanwhile(file, "support@3", [{"target": "support@3", "weight": 100}], previous="support@2")
    await told(stack)

    assert await pointers(admin) == ("support@3", "support@1")  # `previous` names no marked version
    assert await answering(stack) == "support@3"
    assert await marked(stack) == {"support@2"}
    [note] = await notes(stack)
    assert note["outcome"] == "superseded"
    assert note["served"]["stable"] == "support@1"


async def test_a_target_that_was_condemned_meanwhile_is_passed_over(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)

    async with gone(stack) as file:
        assert (await roll_back(admin, **GLASS)).json()["moved_to"] == "support@2"
        with closing(sqlite3.connect(file)) as other:
            other.execute("UPDATE adapter_versions SET state = 'quarantined' WHERE version = 2")
            other.commit()
    await told(stack)

    assert await pointers(admin) == ("support@1", BASE)


async def test_a_route_that_the_database_does_not_know_any_more_is_told_in_the_audit_log(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    await promoted(stack, admin, 1, 2)

    async with gone(stack) as file:
        assert (await roll_back(admin, **GLASS)).status_code == 200
        with closing(sqlite3.connect(file)) as other:
            other.execute("DELETE FROM routes")
            other.commit()
    await told(stack)

    assert [note["outcome"] for note in await notes(stack)] == ["route_gone"]


# ---- Crashes


async def test_told_and_killed_before_it_was_noted_it_is_told_once(
    stack: Stack, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await promoted(stack, admin, 1, 2)
    append, refused = Journal.append, list[Settled]()

    def refusing(journal: Journal, line: Rollback | Settled) -> None:
        if isinstance(line, Settled) and len(refused) < 3:
            refused.append(line)
            raise Unavailable("as if killed", code="journal_failed")
        append(journal, line)

    monkeypatch.setattr(Journal, "append", refusing)
    async with locked(stack):
        assert (await roll_back(admin, **GLASS)).status_code == 200
    await told(stack)

    assert len(refused) == 3
    assert [note["outcome"] for note in await notes(stack)] == ["applied"]
    assert await pointers(admin) == ("support@1", BASE)


async def test_what_cannot_be_journalled_moves_nothing(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    stack.settings.journal_path.mkdir()

    async with gone(stack):
        answer = await roll_back(admin, **GLASS)
        served = await answering(stack)

    assert code(answer) == (503, "journal_failed")
    assert served == "support@2"


# ---- When all is well, and when it is not allowed


async def test_with_the_database_it_is_an_ordinary_rollback(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)

    answer = await roll_back(admin, **GLASS)

    assert (answer.status_code, answer.json()["journalled"]) == (200, False)
    assert not stack.settings.journal_path.exists()
    [row] = await audited(stack, "route.rollback")
    assert row.reason == GLASS["reason"]


async def test_who_may_not_and_what_is_not_there(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)

    async with gone(stack):
        nameless = await roll_back(admin, break_glass=True)
        unknown = await admin.post("/api/routes/nothing/rollback", json=GLASS)
        never_stable = await roll_back(admin, **GLASS, to="support@7")
        async with stack.client("inference") as client:
            stranger = await client.post("/api/routes/support/rollback", json=GLASS)
        ordinary = await roll_back(admin)
        served = await answering(stack)

    assert code(nameless) == (400, "reason_required")
    assert code(unknown) == (404, "route_not_found")
    assert never_stable.status_code == 400
    assert stranger.status_code == 403
    assert code(ordinary) == (503, "database_lost")
    assert served == "support@2"
    assert not stack.settings.journal_path.exists()


async def test_without_the_database_too_a_route_of_another_project_is_not_found(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    await promoted(stack, admin, 1, 2)
    keys = Keys(stack.database, load_pepper(stack.settings))
    _, stack.keys["neighbour"] = await keys.create("neighbour", ["admin"], actor="test", project_id="proj_other")
    await stack.see()

    async with gone(stack):
        async with stack.client("neighbour") as neighbour:
            refused = await roll_back(neighbour, **GLASS)
        served = await answering(stack)

    assert code(refused) == (404, "route_not_found")
    assert served == "support@2"
    assert not stack.settings.journal_path.exists()


async def test_a_move_that_is_made_later_is_not_undone_by_the_settled_journal(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    await promoted(stack, admin, 1, 2)
    async with locked(stack):
        assert (await roll_back(admin, **GLASS)).status_code == 200
    await told(stack)

    assert (await promote(admin, "support@2", **FORCED)).status_code == 200
    await stack.stop()
    await stack.serve()

    assert await answering(stack) == "support@2"
    assert await marked(stack) == set()


async def test_of_many_at_once_one_is_journalled(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)

    async with gone(stack):
        answers = await asyncio.gather(*(roll_back(admin, **GLASS) for _ in range(10)))

    assert {answer.json()["moved_to"] for answer in answers} == {"support@2"}
    await told(stack)
    assert len(await notes(stack)) == 1


async def test_a_damaged_database_is_as_good_as_lost(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    file = database_file(stack)
    content = file.read_bytes()
    with file.open("r+b") as damaged:
        damaged.write(b"\0" * 4096)

    answer = await roll_back(admin, **GLASS)
    served = await answering(stack)
    with file.open("r+b") as mended:
        mended.write(content[:4096])
    await told(stack)

    assert (answer.status_code, answer.json()["journalled"], served) == (200, True, "support@1")
    assert await pointers(admin) == ("support@1", BASE)


async def test_the_command_line_says_how_to_go_on_without_the_database(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)

    def turnout(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"TURNOUT_URL": stack.url, "TURNOUT_API_KEY": stack.keys["admin"], "COLUMNS": "200"}
        argv = [sys.executable, "-m", "gateway.cli", "rollback", "support", *arguments]
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=False)

    async with gone(stack):
        ordinary = await asyncio.to_thread(turnout)
        broken = await asyncio.to_thread(turnout, "--break-glass", "--reason", "nonsense")
    await told(stack)

    assert ordinary.returncode == 1
    assert "turnout rollback support --break-glass --reason" in ordinary.stderr
    assert broken.returncode == 0, broken.stderr
    assert "support@2 → support@1" in broken.stdout
    assert "journalled" in broken.stdout
    assert await pointers(admin) == ("support@1", BASE)
