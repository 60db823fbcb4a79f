"""The command line against a real gateway over the fake engine: every command that needs a server."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway import tables
from gateway.registry.models import VersionState
from tests.cli_world import as_json, turnout, two_versions
from tests.corpus import make_adapter
from tests.fakes.stack import BASE, Stack

SUITE = "schema: 1\nname: nice\nchecks: []\n"


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        yield running


async def test_publishes_a_folder_and_shows_where_it_comes_from(stack: Stack, tmp_path: Path) -> None:
    make_adapter(tmp_path / "peft", stack.gateway.services.registry.base, seed=1)

    published = await turnout(stack, "publish", str(tmp_path / "peft"), "--adapter", "support")
    again = await as_json(stack, "publish", str(tmp_path / "peft"), "--adapter", "support")
    shown = await turnout(stack, "adapters", "show", "support@1")
    listed = await as_json(stack, "adapters", "list")

    assert published.returncode == 0, published.stderr
    assert "support@1" in published.stdout
    assert again["full_name"] == "support@1"
    assert shown.returncode == 0, shown.stderr
    assert again["digest"] in shown.stdout
    assert [version["full_name"] for version in listed[0]["versions"]] == ["support@1"]


async def test_publish_wait_ends_with_the_reason_of_a_rejection(stack: Stack, tmp_path: Path) -> None:
    registry = stack.gateway.services.registry
    make_adapter(tmp_path / "peft", registry.base, seed=1)
    await turnout(stack, "publish", str(tmp_path / "peft"), "--adapter", "support")
    version = await registry.version("support@1")
    await registry.set_state(
        version.id, VersionState.REJECTED, code="log_loss", reason="it [knows] nothing", actor="test"
    )

    done = await turnout(stack, "publish", str(tmp_path / "peft"), "--adapter", "support", "--wait")

    assert done.returncode == 1
    assert "it [knows] nothing" in done.stderr
    assert "(log_loss)" in done.stderr


async def test_refuses_what_is_no_folder(stack: Stack, tmp_path: Path) -> None:
    done = await turnout(stack, "publish", str(tmp_path / "absent"), "--adapter", "support")

    assert done.returncode == 2
    assert "is not a folder" in done.stderr


async def test_splits_promotes_and_rolls_back(stack: Stack) -> None:
    await two_versions(stack)

    split = await as_json(
        stack, "routes", "set", "support", "-v", "base=50", "-v", "support@1=50", "--force", "--reason", "A/B"
    )
    promoted = await turnout(stack, "promote", "support", "support@2", "--force", "--reason", "test")
    back = await as_json(stack, "rollback", "support", "--reason", "wrong", "--confirm")
    audit = await turnout(stack, "audit", "--subject", "support")

    assert [(arm["target"], arm["weight"]) for arm in split["variants"]] == [(BASE, 50), ("support@1", 50)]
    assert "support@1 → support@2" in promoted.stdout, promoted.stderr
    assert (back["moved_from"], back["moved_to"], back["needs_load"]) == ("support@2", "support@1", False)
    assert 0 < back["call_ms"] < back["first_answer_ms"]
    assert back["completed_at"] > back["started_at"]
    assert "wrong" in audit.stdout


async def test_a_rollback_tells_where_to_and_what_it_took(stack: Stack) -> None:
    await two_versions(stack)
    await turnout(stack, "promote", "support", "support@2", "--force", "--reason", "test")

    done = await turnout(stack, "rollback", "support", "--reason", "wrong")

    assert done.returncode == 0, done.stderr
    assert "support@2 → support@1" in done.stdout
    assert "(loaded;" in done.stdout
    assert "The call took" in done.stdout


async def test_a_promotion_without_a_gate_is_refused_with_what_to_do(stack: Stack) -> None:
    await two_versions(stack)

    done = await turnout(stack, "promote", "support", "support@2")

    assert done.returncode == 1
    assert "(no_gate)" in done.stderr
    assert "--force" in done.stderr


@pytest.mark.parametrize(("verdict", "code"), [("failed", 1), ("inconclusive", 2), ("passed", 0)])
async def test_a_gate_decides_a_promotion_and_its_exit_code(
    stack: Stack, tmp_path: Path, verdict: str, code: int
) -> None:
    await two_versions(stack)
    suite = tmp_path / "nice"
    suite.mkdir()
    (suite / "suite.yaml").write_text(SUITE)
    added = await as_json(stack, "suite", "add", str(suite))
    gated = await as_json(stack, "routes", "gates", "support", "--suite", "nice")
    stable, version = [await stack.gateway.services.registry.version(f"support@{number}") for number in (1, 2)]
    await stack.add_verdict(version, "nice", verdict, suite_digest=added["digest"], baseline=stable.digest)

    done = await turnout(stack, "promote", "support", "support@2")

    assert gated["gates"] == ["nice"]
    assert done.returncode == code, done.stdout + done.stderr


async def test_lists_suites(stack: Stack, tmp_path: Path) -> None:
    suite = tmp_path / "nice"
    suite.mkdir()
    (suite / "suite.yaml").write_text(SUITE)
    await turnout(stack, "suite", "add", str(suite))

    done = await turnout(stack, "suite", "list")

    assert "nice" in done.stdout
    assert "registered" in done.stdout


async def test_starts_and_shows_an_evaluation(stack: Stack, tmp_path: Path) -> None:
    await two_versions(stack)
    suite = tmp_path / "nice"
    suite.mkdir()
    (suite / "suite.yaml").write_text(SUITE)
    await turnout(stack, "suite", "add", str(suite))

    job = await as_json(stack, "eval", "run", "support@2", "--suite", "nice")
    shown = await turnout(stack, "eval", "show", "--target", "support@2")
    listed = await turnout(stack, "jobs", "list")
    cancelled = await turnout(stack, "jobs", "cancel", job["id"])
    logs = await turnout(stack, "jobs", "logs", job["id"])

    assert job["state"] == "queued"
    assert "queued" in shown.stdout
    assert "support@2 on nice" in listed.stdout
    assert cancelled.returncode == 0, cancelled.stderr
    assert logs.returncode == 0, logs.stderr


async def test_no_evaluation_yet_says_how_to_run_one(stack: Stack) -> None:
    await two_versions(stack)

    done = await turnout(stack, "eval", "show", "--target", "support@2")

    assert done.returncode == 1
    assert "turnout eval run support@2" in done.stderr


async def test_keys_are_made_listed_and_revoked(stack: Stack) -> None:
    made = await as_json(stack, "keys", "create", "shop", "--scope", "inference", "--expires-in-days", "30")
    before = await turnout(stack, "routes", "list", key=made["key"])
    revoked = await turnout(stack, "keys", "revoke", made["id"])
    after = await turnout(stack, "routes", "list", key=made["key"])
    listed = await turnout(stack, "keys", "list")

    assert before.returncode == 0, before.stderr
    assert revoked.returncode == 0, revoked.stderr
    assert after.returncode == 1
    assert "(invalid_api_key)" in after.stderr
    assert "shop" in listed.stdout
    assert made["key"] not in listed.stdout


async def test_without_a_key_it_says_how_to_send_one(stack: Stack) -> None:
    done = await turnout(stack, "routes", "list", key=None)

    assert done.returncode == 1
    assert "(missing_api_key)" in done.stderr


async def test_a_scope_too_small_is_named(stack: Stack) -> None:
    await two_versions(stack)

    done = await turnout(stack, "rollback", "support", key="inference")

    assert done.returncode == 1
    assert "'admin'" in done.stderr


async def test_chat_prints_the_answer_and_who_gave_it(stack: Stack) -> None:
    await two_versions(stack)

    done = await turnout(stack, "chat", "support", "hello", "--user", "u1")

    assert done.returncode == 0, done.stderr
    assert "version support@1" in done.stdout


async def test_status_is_one_screen_and_json_is_one_document(stack: Stack) -> None:
    await two_versions(stack)

    people = await turnout(stack, "status", "--wait")
    data = await as_json(stack, "status")

    assert people.returncode == 0, people.stderr
    assert "serving" in people.stdout
    assert "support@1 100 %" in people.stdout
    assert data["ready"] is True
    assert data["routes"][0]["stable"] == "support@1"


async def test_status_without_an_engine_is_exit_1(stack: Stack) -> None:
    await stack.set_replica("replica-1", state="failed", reason="out of memory")

    done = await turnout(stack, "status")

    assert done.returncode == 1
    assert "out of memory" in done.stdout


@asynccontextmanager
async def status_wait(stack: Stack, key: str = "admin") -> AsyncIterator[Waiting]:
    """`turnout status --wait` while it follows the engine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TURNOUT_")}
    environment = kept | {"TURNOUT_URL": stack.url, "TURNOUT_API_KEY": stack.keys[key], "COLUMNS": "250"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway.cli", "status", "--wait", env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield Waiting(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@dataclass
class Waiting:
    process: asyncio.subprocess.Process
    said: str = ""

    async def says(self, words: str) -> None:
        """Read on until it has said this."""
        assert self.process.stdout is not None
        while words not in self.said:
            line = await asyncio.wait_for(self.process.stdout.readline(), 60)
            assert line, f"it ended without {words!r}: {self.said}"
            self.said += line.decode()

    async def ends(self) -> tuple[int | None, str]:
        """Its exit code, and what it said last on stderr."""
        out, err = await asyncio.wait_for(self.process.communicate(), 60)
        self.said += out.decode()
        return self.process.returncode, err.decode()


@pytest.mark.parametrize(("key", "told"), [("admin", "no room"), ("inference", "a key with scope 'admin' is told why")])
async def test_status_wait_tells_each_failure_and_gives_up_when_another_start_is_of_no_use(
    stack: Stack, key: str, told: str
) -> None:
    await stack.set_replica("replica-1", state="starting", self_test="pending")
    async with status_wait(stack, key) as command:
        await command.says("replica-1 is starting")
        for count, words in enumerate(("once", "2 times in a row", "3 times in a row"), 1):
            await stack.set_replica("replica-1", failures=count, futile_starts=count, last_failure="no room [x]")
            await command.says(f"replica-1 failed {words}; the last time: {told}")
        code, complaint = await command.ends()

    assert code == 1
    assert "(engine_never_ready)" in complaint
    assert told in complaint
    assert "turnout doctor" in complaint


async def test_status_shows_the_noise_that_the_engine_measured(stack: Stack) -> None:
    await stack.set_replica("replica-1", batch_noise=0.3159)

    shown = await turnout(stack, "status")
    data = json.loads((await turnout(stack, "--json", "status")).stdout)

    assert "0.316 nats" in shown.stdout
    assert data["replicas"][0]["batch_noise"] == 0.3159


async def test_status_wait_goes_on_while_adapters_are_to_blame(stack: Stack) -> None:
    await stack.set_replica("replica-1", state="starting", self_test="pending")
    async with status_wait(stack) as command:
        await command.says("replica-1 is starting")
        await stack.set_replica("replica-1", failures=9, futile_starts=2, last_failure="died of support@3")
        await command.says("failed 9 times in a row; the last time: died of support@3")
        await stack.set_replica("replica-1", state="testing", self_test="running")
        await command.says("replica-1 does its self-test")
        await stack.set_replica("replica-1", state="ready", self_test="passed")
        code, complaint = await command.ends()

    assert code == 0, complaint
    assert "serving" in command.said


async def test_status_wait_without_a_key_says_at_once_how_to_send_one(stack: Stack) -> None:
    await stack.set_replica("replica-1", state="starting", self_test="pending")

    done = await turnout(stack, "status", "--wait", key=None)

    assert done.returncode == 1
    assert "(missing_api_key)" in done.stderr


async def test_publish_wait_ends_when_no_engine_will_ever_load_it(stack: Stack, tmp_path: Path) -> None:
    registry = stack.gateway.services.registry
    make_adapter(tmp_path / "peft", registry.base, seed=1)
    version = await as_json(stack, "publish", str(tmp_path / "peft"), "--adapter", "support")
    await registry.set_state(version["id"], VersionState.VERIFIED, code=None, reason=None, actor="test")
    await stack.set_replica("replica-1", state="failed", failures=2, futile_starts=2, last_failure="no room")
    command = asyncio.create_task(turnout(stack, "publish", str(tmp_path / "peft"), "--adapter", "support", "--wait"))
    while not command.done():  # whenever it looks first, the next failure is one that it sees
        (row,) = await stack.rows(tables.replicas)
        await stack.set_replica("replica-1", failures=row.failures + 1, futile_starts=row.failures + 1)
        await asyncio.wait({command}, timeout=0.5)
    done = await command

    assert done.returncode == 1
    assert "no room" in done.stderr
    assert "(engine_never_ready)" in done.stderr


async def test_status_shows_what_became_of_earlier_starts(stack: Stack) -> None:
    await stack.set_replica("replica-1", state="starting", failures=2, last_failure="no room")

    done = await turnout(stack, "status")

    assert "failed 2 times in a row: no room" in done.stdout


async def test_an_unknown_route_is_named(stack: Stack) -> None:
    done = await turnout(stack, "routes", "show", "suport")

    assert done.returncode == 1
    assert "suport" in done.stderr


async def test_two_people_at_once_the_second_is_refused(stack: Stack) -> None:
    await two_versions(stack)
    revision = (await as_json(stack, "routes", "show", "support"))["revision"]
    await turnout(stack, "routes", "set", "support", "-v", "base=2", "--expected-revision", str(revision))

    done = await turnout(stack, "routes", "set", "support", "-v", "base=1", "--expected-revision", str(revision))

    assert done.returncode == 1
    assert "(route_moved)" in done.stderr
