"""Moving traffic by the command line: what it shows, what it asks first, and what becomes of a reply that is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from gateway import client_wire
from gateway.client import Client
from gateway.errors import UpstreamFailed
from gateway.registry.models import VersionState
from tests.cli_world import as_json, turnout, two_versions
from tests.fakes.stack import BASE, Stack, until
from tests.rollouts_world import audited


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        await two_versions(running)
        yield running


async def promote_second(stack: Stack) -> None:
    done = await turnout(stack, "promote", "support", "support@2", "--force", "--reason", "test")
    assert done.returncode == 0, done.stderr


@asynccontextmanager
async def loses_replies(url: str, *, to: bytes, times: int) -> AsyncIterator[str]:
    """A way to the server on which the replies to such requests are lost: they arrive, and the connection breaks."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    left = times

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal left
        far_reader, far_writer = await asyncio.open_connection(host, port)
        is_lost = False

        async def ask() -> None:
            nonlocal is_lost
            while request := await reader.read(2**16):
                is_lost = is_lost or (to in request and left > 0)
                far_writer.write(request)

        asking = asyncio.create_task(ask())
        with suppress(ConnectionError):
            while reply := await far_reader.read(2**16):
                if is_lost:
                    left -= 1
                    break
                writer.write(reply)
        asking.cancel()
        far_writer.close()
        writer.close()

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.invariant(7)
async def test_a_rollback_whose_reply_is_lost_is_asked_for_again_and_moves_once(stack: Stack) -> None:
    await promote_second(stack)

    async with loses_replies(stack.url, to=b"/rollback", times=2) as url:
        done = await turnout(stack, "rollback", "support", "--reason", "wrong", url=url)

    assert done.returncode == 0, done.stderr
    assert "support@2 → support@1" in done.stdout
    assert "by an earlier call" in done.stdout
    assert len(await audited(stack, "route.rollback")) == 1
    assert (await as_json(stack, "routes", "show", "support"))["stable"] == "support@1"


@pytest.mark.invariant(7)
async def test_the_key_of_a_move_that_was_given_up_gets_its_answer_later(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    await promote_second(stack)
    monkeypatch.setattr(client_wire, "REPEAT_AFTER_S", (0.0, 0.0))
    async with loses_replies(stack.url, to=b"/rollback", times=99) as url:
        with Client(url, stack.keys["admin"]) as client, pytest.raises(UpstreamFailed) as lost:
            await asyncio.to_thread(client.rollback, "support", reason="wrong")
    key = lost.value.message.partition("--idempotency-key ")[2]

    again = await turnout(stack, "rollback", "support", "--reason", "wrong", "--idempotency-key", key)
    unkeyed = await turnout(stack, "rollback", "support", "--reason", "wrong")

    assert (again.returncode, unkeyed.returncode) == (0, 1)
    assert "may have been made" in lost.value.message
    assert "nothing moved now" in again.stdout
    assert "was rolled back already" in unkeyed.stderr
    assert len(await audited(stack, "route.rollback")) == 1


async def test_a_rollback_shows_before_and_after_and_a_dry_run_only_shows(stack: Stack) -> None:
    await promote_second(stack)

    shown = await turnout(stack, "rollback", "support", "--dry-run")
    untouched = await as_json(stack, "routes", "show", "support")
    done = await turnout(stack, "rollback", "support", "--reason", "wrong")

    assert "Nothing moved. Would be rolled back" in shown.stdout, shown.stderr
    assert untouched["stable"] == "support@2"
    for text in (shown.stdout, done.stdout):
        assert "before  traffic support@2 100 %; stable support@2, previous support@1" in text
        assert f"after   traffic support@1 100 %; stable support@1, previous {BASE}" in text
        assert "marked  support@2: traffic returns to it by --force only" in text


async def test_a_split_names_what_it_tries(stack: Stack) -> None:
    arms = ("-v", "base=80", "-v", "support@1=10", "-v", "support@2=10")

    split = await as_json(stack, "routes", "set", "support", *arms, "--try", "support@2", "--force", "--reason", "x")
    shown = await turnout(stack, "routes", "show", "support")
    nothing = await as_json(stack, "routes", "set", "support", *arms, "--no-trial", "--force", "--reason", "x")
    wrong = await turnout(stack, "routes", "set", "support", *arms, "--no-trial", "--try", "base")

    assert split["trial"]["arms"] == ["support@2"]
    assert "support@2 against support@1, since revision" in shown.stdout
    assert nothing["trial"] is None
    assert wrong.returncode == 2


async def test_it_says_that_a_load_is_needed_before_it_moves_and_can_wait_for_it(stack: Stack) -> None:
    version = (await stack.gateway.services.registry.versions())[0]
    await promote_second(stack)
    await stack.set_route("support", previous=BASE)  # so that nothing but the command asks for the load
    await stack.unload(version)

    refused = await turnout(stack, "rollback", "support", "--to", "support@1")
    waiting = asyncio.create_task(turnout(stack, "rollback", "support", "--to", "support@1", "--wait-for-load"))
    await until(lambda: stack.gateway.table.current.routes["support"].candidate == "support@1" or waiting.done())
    await stack.load(version)
    done = await waiting

    assert refused.returncode == 1
    assert "--accept-load" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert "(loaded;" in done.stdout
    assert (await as_json(stack, "routes", "show", "support"))["stable"] == "support@1"


async def test_a_promotion_can_wait_for_the_load_too(stack: Stack) -> None:
    version = (await stack.gateway.services.registry.versions())[1]
    await stack.unload(version)
    arguments = ("promote", "support", "support@2", "--force", "--reason", "x")

    refused = await turnout(stack, *arguments)
    waiting = asyncio.create_task(turnout(stack, *arguments, "--wait-for-load"))
    await until(lambda: stack.gateway.table.current.routes["support"].candidate == "support@2" or waiting.done())
    await stack.load(version)
    done = await waiting

    assert "not_resident" in refused.stderr
    assert done.returncode == 0, done.stderr
    assert "support@1 → support@2" in done.stdout


async def test_waiting_ends_when_the_version_can_never_be_loaded(stack: Stack) -> None:
    version = (await stack.gateway.services.registry.versions())[1]
    await stack.unload(version)
    await stack.gateway.services.registry.set_state(
        version.id, VersionState.QUARANTINED, code="probe_failed", reason="it is no good", actor="test"
    )

    done = await turnout(stack, "promote", "support", "support@2", "--force", "--reason", "x", "--wait-for-load")

    assert done.returncode == 1
    assert "not_verified" in done.stderr
