"""Promotion and rollback over HTTP and in the database: gates, residency, compare-and-swap, audit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from gateway import tables
from gateway.database import DEFAULT_PROJECT
from gateway.errors import Conflict, GatewayError
from gateway.keys import Principal
from gateway.registry.models import VersionState
from gateway.rollouts import conditions, promotion
from gateway.routing import store
from gateway.routing.models import Route, Variant
from gateway.turns import Hurry
from tests.fakes.stack import BASE, Stack, chat_body, until
from tests.rollouts_world import (
    FORCED,
    add_suites,
    answering,
    audited,
    code,
    current_digest,
    pointers,
    promote,
    promoted,
    roll_back,
    split,
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


# ---- Gates


@pytest.mark.invariant(6)
async def test_a_promotion_needs_every_gate_passed_for_that_very_digest(stack: Stack, admin: httpx.AsyncClient) -> None:
    first, second = await stack.add_version("support", 1), await stack.add_version("support", 2)
    target, forgetting = await current_digest(stack, "target"), await current_digest(stack, "forgetting")
    assert code(await promote(admin, "support@1")) == (422, "no_gate")
    await admin.put("/api/routes/support/gates", json={"suites": ["target", "forgetting"]})

    assert code(await promote(admin, "support@1")) == (422, "gate_missing")
    await stack.add_verdict(first, "target", "passed", suite_digest=target)
    assert code(await promote(admin, "support@1")) == (422, "gate_missing")
    await stack.add_verdict(first, "forgetting", "passed", suite_digest="e" * 64)
    assert code(await promote(admin, "support@1")) == (422, "gate_missing")
    await stack.add_verdict(first, "forgetting", "passed", suite_digest=forgetting, id="verdict-now")

    assert (await promote(admin, "support@2")).status_code == 422
    assert (await promote(admin, "support@1")).status_code == 200
    assert await pointers(admin) == ("support@1", BASE)
    assert second.promoted_at is None


@pytest.mark.invariant(6)
async def test_a_verdict_against_an_older_stable_does_not_count(stack: Stack, admin: httpx.AsyncClient) -> None:
    version = await stack.add_version("support", 1)
    await admin.put("/api/routes/support/gates", json={"suites": ["target"]})
    digest = await current_digest(stack, "target")
    await stack.add_verdict(version, "target", "passed", suite_digest=digest, baseline="a" * 64)

    refused = await promote(admin, "support@1")
    await stack.add_verdict(version, "target", "passed", suite_digest=digest, id="verdict-present")

    assert code(refused) == (422, "gate_missing")
    assert (await promote(admin, "support@1")).status_code == 200


@pytest.mark.invariant(6)
async def test_a_verdict_against_base_opens_no_gate_against_a_stable_version(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    [stable] = await promoted(stack, admin, 1)
    version = await stack.add_version("support", 2)
    await admin.put("/api/routes/support/gates", json={"suites": ["target"]})
    digest = await current_digest(stack, "target")
    await stack.add_verdict(version, "target", "passed", suite_digest=digest, baseline=version.base_digest)

    against_base = await promote(admin, "support@2")
    await stack.add_verdict(
        version, "target", "passed", suite_digest=digest, baseline=stable.digest, id="verdict-against-stable"
    )

    assert code(against_base) == (422, "gate_missing")
    assert (await promote(admin, "support@2")).status_code == 200


@pytest.mark.invariant(6)
async def test_another_projects_verdict_on_the_same_weights_opens_no_gate(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    version = await stack.add_version("support", 1)
    await admin.put("/api/routes/support/gates", json={"suites": ["target"]})
    digest = await current_digest(stack, "target")
    await stack.add_verdict(version, "target", "passed", suite_digest=digest, project_id="proj_other")

    assert code(await promote(admin, "support@1")) == (422, "gate_missing")


@pytest.mark.invariant(6)
@pytest.mark.parametrize("verdict", ["failed", "inconclusive", "error"])
async def test_only_passed_is_passed(stack: Stack, admin: httpx.AsyncClient, verdict: str) -> None:
    version = await stack.add_version("support", 1)
    await admin.put("/api/routes/support/gates", json={"suites": ["target"]})
    await stack.add_verdict(version, "target", verdict, suite_digest=await current_digest(stack, "target"))

    assert code(await promote(admin, "support@1")) == (422, f"gate_{verdict}")
    assert await pointers(admin) == (BASE, BASE)


@pytest.mark.mutant(6)
async def test_a_promotion_that_passed_no_gate_would_be_seen(
    stack: Stack, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unguarded(*arguments: object, **options: object) -> None:
        return None

    monkeypatch.setattr(promotion, "check_gates", unguarded)

    with pytest.raises((AssertionError, KeyError)):
        await test_only_passed_is_passed(stack, admin, "failed")


async def test_force_needs_a_reason_and_both_are_kept(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version("support", 1)
    assert code(await promote(admin, "support@1", force=True)) == (400, "reason_required")
    assert code(await promote(admin, "support@1", force=True, reason="  ")) == (400, "reason_required")

    assert (await promote(admin, "support@1", force=True, reason="the demo's bad one")).status_code == 200

    [entry] = await audited(stack, "route.promote")
    assert (entry.actor, entry.subject, entry.reason) == ("key:admin", "support", "the demo's bad one")
    assert (entry.before["stable"], entry.after["stable"], entry.after["force"]) == (BASE, "support@1", True)


async def test_a_gate_must_be_a_suite_that_exists(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version("support", 1)

    response = await admin.put("/api/routes/support/gates", json={"suites": ["target", "nothing"]})

    assert response.status_code == 404
    assert (await admin.get("/api/routes/support")).json()["gates"] == []


# ---- Residency


@pytest.mark.invariant(6)
async def test_a_version_gets_a_share_only_when_every_ready_engine_has_it(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    version = await stack.add_version("support", 1)
    await stack.add_replica("replica-2", stack.engine)
    variants = {"variants": [{"target": "support@1", "weight": 1}, {"target": BASE, "weight": 1}], **FORCED}

    assert code(await promote(admin, "support@1", **FORCED)) == (409, "not_resident")
    assert code(await admin.put("/api/routes/support/variants", json=variants)) == (409, "not_resident")
    await stack.load(version, "replica-2")

    assert (await admin.put("/api/routes/support/variants", json=variants)).status_code == 200
    assert (await promote(admin, "support@1", **FORCED)).status_code == 200


@pytest.mark.invariant(6)
@pytest.mark.parametrize("state", ["loading", "probing", "waiting", "refused", "quarantined"])
async def test_only_what_was_probed_is_loaded(stack: Stack, admin: httpx.AsyncClient, state: str) -> None:
    version = await stack.add_version("support", 1)
    async with stack.database.write() as connection:
        await connection.execute(update(tables.residency).values(state=state))

    assert code(await promote(admin, version.name, **FORCED)) == (409, "not_resident")
    assert await pointers(admin) == (BASE, BASE)


@pytest.mark.mutant(6)
async def test_a_share_without_residency_would_be_seen(
    stack: Stack, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unguarded(*arguments: object) -> None:
        return None

    monkeypatch.setattr(promotion, "check_resident", unguarded)

    with pytest.raises((AssertionError, KeyError)):
        await test_a_version_gets_a_share_only_when_every_ready_engine_has_it(stack, admin)


async def test_without_a_ready_engine_nothing_is_promoted_even_by_force(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version("support", 1)
    await stack.set_replica("replica-1", state="failed")

    assert code(await promote(admin, "support@1", **FORCED)) == (409, "no_ready_engine")


@pytest.mark.invariant(4)
@pytest.mark.parametrize("state", [VersionState.RECEIVED, VersionState.REJECTED, VersionState.QUARANTINED])
async def test_what_was_not_verified_gets_no_traffic_even_by_force(
    stack: Stack, admin: httpx.AsyncClient, state: VersionState
) -> None:
    await stack.add_version("support", 1, state=state)

    assert code(await promote(admin, "support@1", **FORCED)) == (422, "not_verified")
    for path, body in {
        "variants": {"variants": [{"target": "support@1", "weight": 0}, {"target": BASE, "weight": 1}]},
        "candidate": {"target": "support@1"},
    }.items():
        assert code(await admin.put(f"/api/routes/support/{path}", json=body)) == (422, "not_verified")


# ---- Rollback


@pytest.mark.invariant(7)
async def test_rollback_flips_the_pointer_and_the_next_request_sees_it(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    assert await answering(stack) == "support@2"

    moved = (await roll_back(admin, reason="answers are wrong")).json()

    assert await answering(stack) == "support@1"
    assert (moved["moved_from"], moved["moved_to"], moved["needs_load"]) == ("support@2", "support@1", False)
    assert moved["took_ms"] > 0
    assert moved["revision"] == moved["route"]["revision"]
    assert await pointers(admin) == ("support@1", BASE)
    rows = {row.version: row for row in await stack.rows(tables.adapter_versions)}
    assert (rows[1].rolled_back_at is None, rows[2].rolled_back_at is None) == (True, False)
    [entry] = await audited(stack, "route.rollback")
    assert (entry.reason, entry.before["stable"], entry.after["stable"]) == (
        "answers are wrong",
        "support@2",
        "support@1",
    )


@pytest.mark.invariant(7)
async def test_rollback_waits_for_no_load_and_says_when_one_is_needed(stack: Stack, admin: httpx.AsyncClient) -> None:
    first, _ = await promoted(stack, admin, 1, 2)
    await stack.unload(first)
    calls = list(stack.engine.calls)

    unasked = await roll_back(admin)
    untouched = await answering(stack)
    moved = (await roll_back(admin, accept_load=True)).json()

    assert code(unasked) == (409, "needs_load")
    assert untouched == "support@2"
    assert (moved["moved_to"], moved["needs_load"]) == ("support@1", True)
    assert stack.engine.calls == calls, "it moved while nothing was loaded"
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=chat_body(model="support"))
    assert code(response) == (503, "variant_not_ready")


@pytest.mark.mutant(7)
async def test_a_rollback_that_waited_for_a_load_would_be_seen(
    stack: Stack, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def waiting(connection: Any, versions: list[Any], target: str) -> bool:
        for version in versions:
            if version.name == target:
                await conditions.check_resident(connection, version)
        return False

    monkeypatch.setattr(promotion, "needs_load", waiting)

    with pytest.raises((AssertionError, KeyError)):
        await test_rollback_waits_for_no_load_and_says_when_one_is_needed(stack, admin)


@pytest.mark.invariant(7)
async def test_rolling_back_twice_and_on_to_base(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)
    seen = []
    for is_second in (False, True, True):
        assert (await roll_back(admin, further=is_second)).status_code == 200
        seen.append((await pointers(admin), await answering(stack)))

    assert seen == [
        (("support@2", "support@1"), "support@2"),
        (("support@1", BASE), "support@1"),
        ((BASE, BASE), BASE),
    ]
    assert code(await roll_back(admin)) == (409, "nothing_to_roll_back")


@pytest.mark.invariant(7)
async def test_of_two_rollbacks_at_once_one_wins(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)

    # Nobody can write until all six are in, so that none of them has seen another's move.
    async with stack.database.write():
        asking = [asyncio.create_task(roll_back(admin)) for _ in range(6)]
        await until(lambda: stack.gateway.lifecycle.in_flight == 6)
    answers = await asyncio.gather(*asking)

    assert [answer.status_code for answer in answers] == [200] * 6
    assert sorted(answer.json()["repeated"] for answer in answers) == [False, True, True, True, True, True]
    assert {answer.json()["moved_to"] for answer in answers} == {"support@2"}
    assert await pointers(admin) == ("support@2", "support@1")
    assert len(await audited(stack, "route.rollback")) == 1


async def test_of_two_rollbacks_of_one_revision_one_wins(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)
    seen = stack.gateway.table.current.routes["support"].revision

    found = [await roll_back(admin, expected_revision=seen) for _ in range(3)]
    other = await roll_back(admin, expected_revision=seen, to="support@1")

    assert [answer.status_code for answer in found] == [200, 200, 200]
    assert [answer.json()["repeated"] for answer in found] == [False, True, True]
    assert code(other) == (409, "route_moved")
    assert await pointers(admin) == ("support@2", "support@1")


@pytest.mark.invariant(7)
async def test_a_rollback_is_bound_to_the_route_as_it_was_when_it_was_called(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    """Also for callers that name no revision: while it waits for its turn somebody else moves the route."""
    await promoted(stack, admin, 1, 2, 3)
    caller = Principal("key-1", "admin", DEFAULT_PROJECT, frozenset({"admin"}))
    waits = Hurry(stack.settings.home / "turnout.db")

    async with stack.database.write() as connection:
        asked = asyncio.create_task(stack.gateway.services.promotions.rollback("support", principal=caller))
        await until(waits.is_shown_by_another)
        table = tables.routes
        await connection.execute(update(table).values(revision=table.c.revision + 1, stable="support@1"))

    with pytest.raises(Conflict) as caught:
        await asked
    waits.close()
    assert caught.value.code == "route_moved"
    assert (await admin.get("/api/routes/support")).json()["stable"] == "support@1"


@pytest.mark.mutant(7)
async def test_a_rollback_not_bound_to_what_it_saw_would_be_seen(
    stack: Stack, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = promotion._held

    async def unbound(connection: Any, name: str, principal: Any, expected_revision: int | None) -> Route:
        return await real(connection, name, principal, None)

    monkeypatch.setattr(promotion, "_held", unbound)

    with pytest.raises((AssertionError, KeyError)):
        await test_of_two_rollbacks_of_one_revision_one_wins(stack, admin)


@pytest.mark.mutant(7)
async def test_a_rollback_that_did_not_know_its_repeats_would_be_seen(
    stack: Stack, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forgetful(*arguments: object) -> None:
        return None

    monkeypatch.setattr(promotion, "first_answer", forgetful)

    with pytest.raises((AssertionError, KeyError)):
        await test_of_two_rollbacks_at_once_one_wins(stack, admin)


@pytest.mark.invariant(7)
async def test_a_rollback_during_a_promote_leaves_one_of_the_two_whole(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    await stack.add_version("support", 3)
    for _ in range(5):
        before = await pointers(admin)

        up, down = await asyncio.gather(promote(admin, "support@3", **FORCED), roll_back(admin))

        after = await pointers(admin)
        assert {up.status_code, down.status_code} <= {200, 409}
        last = max((each.json() for each in (up, down) if each.status_code == 200), key=lambda moved: moved["revision"])
        assert after == (last["route"]["stable"], last["route"]["previous"])
        assert await answering(stack) == after[0]
        assert after != before
        assert (await roll_back(admin, further=True)).status_code == 200
        assert (await promote(admin, "support@2", **FORCED)).status_code in (200, 409)


async def test_a_version_that_was_rolled_back_returns_by_force_only(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    await roll_back(admin)

    assert code(await promote(admin, "support@2")) == (422, "rolled_back")
    arms = [{"target": "support@2", "weight": 5}, {"target": "support@1", "weight": 95}]
    assert code(await split(admin, arms)) == (422, "rolled_back")
    assert (await split(admin, arms, **FORCED)).status_code == 200
    more = [{"target": "support@2", "weight": 6}, {"target": "support@1", "weight": 94}]
    less = [{"target": "support@2", "weight": 1}, {"target": "support@1", "weight": 99}]
    assert code(await split(admin, more)) == (422, "rolled_back")
    assert (await split(admin, less)).status_code == 200
    assert code(await promote(admin, "support@2")) == (422, "rolled_back")
    assert (await promote(admin, "support@2", **FORCED)).status_code == 200

    rows = {row.version: row for row in await stack.rows(tables.adapter_versions)}
    assert rows[2].rolled_back_at is None
    assert await pointers(admin) == ("support@2", "support@1")


async def test_a_rollback_to_a_chosen_version(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)
    await roll_back(admin)
    assert code(await roll_back(admin, to="support@3")) == (422, "rolled_back")
    assert code(await roll_back(admin, to="support@3", force=True)) == (400, "reason_required")

    moved = await roll_back(admin, to="support@1")

    assert moved.json()["moved_to"] == "support@1"
    assert code(await roll_back(admin, to="support@2", force=True, reason="x", expected_revision=1)) == (
        409,
        "route_moved",
    )


@pytest.mark.invariant(2)
@pytest.mark.invariant(7)
async def test_no_request_fails_or_is_mislabelled_while_traffic_moves(stack: Stack, admin: httpx.AsyncClient) -> None:
    versions = await promoted(stack, admin, 1, 2)
    engine_names = {BASE: BASE} | {version.name: version.engine_name for version in versions}
    wrong: list[str] = []
    count, is_over = 0, False

    async def traffic(client: httpx.AsyncClient, worker: int) -> None:
        nonlocal count
        while not is_over:
            body = chat_body(f"fake:delay_ms=1 {worker}", model="support", stream=worker % 2 == 0)
            response = await client.post("/v1/chat/completions", json=body)
            named = engine_names[response.headers["x-turnout-version"]]
            if response.status_code != 200 or f'"content":"{named}' not in response.text:
                wrong.append(response.text)
            count += 1

    async def more() -> None:
        reached = count + 12
        await until(lambda: count >= reached)

    async with stack.client("inference") as client:
        workers = [asyncio.create_task(traffic(client, worker)) for worker in range(6)]
        for _ in range(6):
            await more()
            assert (await roll_back(admin)).status_code == 200
            await more()
            assert (await promote(admin, "support@2", **FORCED)).status_code == 200
        is_over = True
        await asyncio.gather(*workers)

    assert wrong == []


async def test_two_gateways_agree_after_one_poll(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    async with stack.sibling() as other:
        await roll_back(admin)
        await other.gateway.table.refresh()

        assert other.gateway.table.current.routes["support"].stable == "support@1"


async def test_the_candidate_is_promoted_when_none_is_named(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version("support", 1)
    assert code(await promote(admin, None, **FORCED)) == (409, "no_candidate")
    await admin.put("/api/routes/support/candidate", json={"target": "support@1"})

    moved = await promote(admin, None, **FORCED)

    assert moved.json()["moved_to"] == "support@1"
    assert moved.json()["route"]["candidate"] is None


async def test_a_route_that_does_not_exist_is_not_found(stack: Stack, admin: httpx.AsyncClient) -> None:
    assert code(await roll_back(admin)) == (404, "route_not_found")
    assert code(await admin.get("/api/routes/support")) == (404, "route_not_found")
    assert (await admin.get("/api/routes")).json() == []


@pytest.mark.parametrize("body", [{"to": 5}, {"force": "maybe"}, {"unknown": 1}, [], "x"])
async def test_a_malformed_move_is_refused_in_openais_form(stack: Stack, admin: httpx.AsyncClient, body: Any) -> None:
    response = await admin.post("/api/routes/support/rollback", json=body)

    assert response.status_code == 400
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


# ---- The store


async def test_a_save_that_was_decided_on_an_older_state_is_refused(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version("support", 1)
    async with stack.database.read() as connection:
        route = await store.get_route(connection, "support", project_id="proj_default")
    async with stack.database.write() as connection:
        await store.save_route(connection, route, actor="a")

    with pytest.raises(Conflict) as caught:
        async with stack.database.write() as connection:
            await store.save_route(
                connection, route.model_copy(update={"variants": (Variant(target="x", weight=1),)}), actor="b"
            )

    assert caught.value.code == "route_moved"
    assert await pointers(admin) == (BASE, BASE)


async def test_a_move_that_fails_in_the_middle_leaves_nothing(
    stack: Stack, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    await promoted(stack, admin, 1)

    async def broken(*arguments: object, **options: object) -> None:
        raise GatewayError("the disk is on fire")

    monkeypatch.setattr(promotion, "record_audit", broken)
    response = await roll_back(admin)

    assert response.status_code == 500
    assert await pointers(admin) == ("support@1", BASE)
    assert [row.rolled_back_at for row in await stack.rows(tables.adapter_versions)] == [None]


async def test_a_damaged_row_leaves_the_last_good_table(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1)
    async with stack.database.write() as connection:
        await connection.execute(update(tables.routes).values(variants=[{"nonsense": 1}]))
        await connection.execute(update(tables.revisions).values(value=tables.revisions.c.value + 1))
    failed = stack.gateway.table.failed_refreshes

    await until(lambda: stack.gateway.table.failed_refreshes > failed)

    assert await answering(stack) == "support@1"
