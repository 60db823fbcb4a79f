"""A move whose reply was lost is asked for again: by key, by revision, by hand, by the client. It is made once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from gateway import tables
from gateway.ids import now
from tests.fakes.stack import BASE, Stack, chat_body, until
from tests.rollouts_world import (
    FORCED,
    add_suites,
    answering,
    audited,
    code,
    pointers,
    promote,
    promoted,
    roll_back,
)


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        add_suites(running)
        yield running


@pytest.fixture
async def admin(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with stack.client("admin") as client:
        yield client


async def keyed(admin: httpx.AsyncClient, what: str = "rollback", key: str = "k-1", **body: Any) -> httpx.Response:
    path, method = f"/api/routes/support/{what}", "PUT" if what == "variants" else "POST"
    return await admin.request(method, path, json=body, headers={"idempotency-key": key})


@pytest.mark.invariant(7)
async def test_a_repeat_by_key_gets_the_first_answer_and_moves_nothing(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)

    first = (await keyed(admin, further=True)).json()
    again = [(await keyed(admin, further=True)).json() for _ in range(2)]

    assert first["repeated"] is False
    assert [each | {"repeated": False, "took_ms": 0} for each in again] == [first | {"took_ms": 0}] * 2
    assert await pointers(admin) == ("support@2", "support@1")
    assert len(await audited(stack, "route.rollback")) == 1


@pytest.mark.parametrize("what", ["promote", "variants"])
async def test_every_move_of_traffic_knows_its_repeats(stack: Stack, admin: httpx.AsyncClient, what: str) -> None:
    await promoted(stack, admin, 1, 2)
    await stack.add_version("support", 3)
    arms = [{"target": "support@2", "weight": 9}, {"target": "support@3", "weight": 1}]
    body: dict[str, Any] = ({"target": "support@3"} if what == "promote" else {"variants": arms}) | FORCED

    first = await keyed(admin, what, **body)
    later = await promote(admin, "support@1", **FORCED)
    again = await keyed(admin, what, **body)

    assert [answer.status_code for answer in (first, later, again)] == [200, 200, 200]
    assert again.json()["repeated"] is True
    assert again.json()["revision"] == first.json()["revision"]
    assert await answering(stack) == "support@1"


async def test_a_key_names_one_move(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)
    await keyed(admin)

    other = await keyed(admin, to="support@1")
    another = await keyed(admin, "promote", target="support@3", **FORCED)

    assert code(other) == code(another) == (422, "idempotency_key_reused")
    assert await pointers(admin) == ("support@2", "support@1")


@pytest.mark.parametrize("key", ["", "k" * 129, "a\tb"])
async def test_a_key_that_is_none_is_refused(stack: Stack, admin: httpx.AsyncClient, key: str) -> None:
    await promoted(stack, admin, 1)

    answer = await keyed(admin, key=key)

    assert answer.status_code == 400
    assert await pointers(admin) == ("support@1", BASE)


async def test_a_refused_move_is_judged_anew_under_its_key(stack: Stack, admin: httpx.AsyncClient) -> None:
    version = await stack.add_version("support", 1)
    await stack.unload(version)
    assert code(await keyed(admin, "promote", target="support@1", **FORCED)) == (409, "not_resident")
    await stack.load(version)

    assert (await keyed(admin, "promote", target="support@1", **FORCED)).json()["repeated"] is False


async def test_answers_are_kept_for_a_day(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)
    await keyed(admin)
    async with stack.database.write() as connection:
        await connection.execute(update(tables.moves).values(at=now() - timedelta(days=1, seconds=1)))

    anew = await keyed(admin, further=True)

    assert (anew.status_code, anew.json()["repeated"], anew.json()["moved_to"]) == (200, False, "support@1")
    assert len(await stack.rows(tables.moves)) == 1, "the old answers went with the first move after their day"


async def test_another_projects_key_is_another_key(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)
    await keyed(admin)
    async with stack.database.write() as connection:
        await connection.execute(update(tables.moves).values(project_id="proj_other"))

    assert (await keyed(admin, further=True)).json()["moved_to"] == "support@1"


@pytest.mark.invariant(7)
async def test_pressed_twice_it_moves_once(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)
    await roll_back(admin)

    again = await roll_back(admin)
    by_alias = await roll_back(admin, to="support@previous")
    named = await roll_back(admin, to="support@1")

    assert code(again) == code(by_alias) == (409, "already_rolled_back")
    said = again.json()["error"]["message"]
    assert "support@3 → support@2" in said
    assert "to support@1" in said
    assert "--further" in said
    assert named.json()["moved_to"] == "support@1"


async def test_after_another_move_a_rollback_is_a_first_one_again(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    await roll_back(admin)
    await stack.add_version("support", 3)
    await promote(admin, "support@3", **FORCED)

    assert (await roll_back(admin)).json()["moved_to"] == "support@1"


@pytest.mark.invariant(7)
async def test_a_rollback_works_while_no_engine_is_ready(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    await stack.set_replica("replica-1", state="failed")

    moved = (await roll_back(admin)).json()

    assert (moved["moved_to"], moved["needs_load"]) == ("support@1", True)


async def test_a_move_onto_base_never_waits_for_a_load(stack: Stack, admin: httpx.AsyncClient) -> None:
    first, _ = await promoted(stack, admin, 1, 2)
    await stack.unload(first)

    refused = await roll_back(admin, to="support@1")
    moved = (await roll_back(admin, to=BASE)).json()

    assert code(refused) == (409, "needs_load")
    assert "--wait-for-load" in refused.json()["error"]["message"]
    assert (moved["moved_to"], moved["needs_load"]) == (BASE, False)


@pytest.mark.invariant(2)
async def test_a_rollback_may_end_the_answers_that_still_run_on_what_was_left(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    await promoted(stack, admin, 1, 2)

    async def ask(model: str, *, stream: bool) -> tuple[int, str]:
        async with stack.client("admin") as client:
            body = chat_body("fake:chunks=20000 fake:delay_ms=20", model=model, stream=stream)
            answer = await client.post("/v1/chat/completions", json=body)
            return answer.status_code, answer.text

    asking = [asyncio.create_task(ask("support", stream=stream)) for stream in (False, True)]
    other = asyncio.create_task(ask("support@1", stream=True))
    await until(lambda: stack.engine.running == 3)

    moved = (await roll_back(admin, cut=True)).json()
    ended = await asyncio.gather(*asking)

    assert moved["answers_cut"] == 2
    for status, text in ended:
        assert status == 503 or "data: " in text
        assert "answer_rolled_back" in text
        assert "[DONE]" not in text
    assert not other.done()
    other.cancel()
