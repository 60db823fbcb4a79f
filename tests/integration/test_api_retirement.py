"""Versions let out of quarantine, given up and taken back over HTTP; and moves while nobody looks after the engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import insert, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway import tables
from gateway.database import DEFAULT_PROJECT, bump_revision
from gateway.errors import Unavailable
from gateway.ids import now
from gateway.registry.models import VersionState
from tests.corpus import make_adapter
from tests.fakes.stack import Stack, a_living_controller, chat_body
from tests.rollouts_world import FORCED, audited, code, promote, promoted, roll_back

WHY = {"reason": "a test"}


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        yield running


@pytest.fixture
async def admin(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with stack.client() as client:
        yield client


async def act(admin: httpx.AsyncClient, what: str, number: int = 1, **body: str) -> httpx.Response:
    return await admin.post(f"/api/adapters/support/versions/{number}/{what}", json=body or WHY)


async def test_a_release_sends_a_quarantined_version_back_to_verification(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    await stack.add_version(state=VersionState.QUARANTINED, state_code="engine_died", state_reason="twice")

    answer = await act(admin, "release")

    assert answer.status_code == 200
    assert (answer.json()["state"], answer.json()["state_code"]) == ("received", None)
    assert await stack.rows(tables.residency) == []
    [row] = await audited(stack, "version.release")
    assert (row.subject, row.reason, row.before["code"]) == ("support@1", "a test", "engine_died")


@pytest.mark.parametrize("state", [state for state in VersionState if state is not VersionState.QUARANTINED])
async def test_only_quarantine_has_a_release(stack: Stack, admin: httpx.AsyncClient, state: VersionState) -> None:
    await stack.add_version(state=state)

    assert code(await act(admin, "release")) == (409, "not_quarantined")


@pytest.mark.parametrize("what", ["release", "retire", "restore"])
async def test_it_takes_an_admin_and_a_reason_and_a_version(stack: Stack, what: str) -> None:
    await stack.add_version()

    async with stack.client("train") as trainer:
        assert (await act(trainer, what)).status_code == 403
    async with stack.client() as admin:
        assert (await act(admin, what, reason="  ")).status_code == 400
        assert (await act(admin, what, 9)).status_code == 404


@pytest.mark.parametrize("role", ["stable", "previous", "candidate", "share"])
async def test_what_a_route_names_is_not_retired(stack: Stack, admin: httpx.AsyncClient, role: str) -> None:
    await stack.add_version()
    share = [{"target": "support@1", "weight": 1}, {"target": "tiny", "weight": 99}]
    await stack.set_route("support", **({"variants": share} if role == "share" else {role: "support@1"}))

    answer = await act(admin, "retire")

    assert code(answer) == (409, "version_in_use")
    assert "route support" in answer.json()["error"]["message"]


async def test_a_retired_version_is_shown_and_neither_served_nor_promoted_nor_evaluated(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    await stack.add_version(is_promoted=True)

    assert (await act(admin, "retire")).json()["retired_at"] is not None
    assert (await act(admin, "retire")).status_code == 200
    await stack.see()

    models = {model["id"] for model in (await admin.get("/v1/models")).json()["data"]}
    assert models == {"tiny", "support"}
    assert code(await admin.post("/v1/chat/completions", json=chat_body(model="support@1"))) == (409, "version_retired")
    assert code(await promote(admin, "support@1", **FORCED)) == (422, "version_retired")
    body = {"target": "support@1", "suite": "target"}
    assert code(await admin.post("/api/evaluations", json=body))[1] in ("version_retired", "suite_not_found")
    assert 'state="retired"} 1.0' in (await admin.get("/metrics")).text
    assert len(await audited(stack, "version.retire")) == 1


async def test_a_rollback_steps_over_a_retired_version(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2, 3)
    assert (await act(admin, "retire", 1)).status_code == 200

    answer = await roll_back(admin)

    assert (answer.json()["route"]["stable"], answer.json()["route"]["previous"]) == ("support@2", "tiny")


@pytest.fixture
async def unfollowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stack]:
    """A gateway that looks at the database once, at its start: what it knows later it was made to see."""
    monkeypatch.setattr("gateway.routing.table.POLL_INTERVAL_S", 3600)
    async with Stack(tmp_path) as running:
        yield running


async def put_state(stack: Stack, state: VersionState) -> None:
    async with stack.database.write() as connection:
        await connection.execute(update(tables.adapter_versions).values(state=state, promoted_at=now()))
        await bump_revision(connection)


async def loaded_unseen(stack: Stack, tmp_path: Path) -> str:
    """The name of a version with files that the engine holds, of which the gateway was told nothing."""
    registry = stack.gateway.services.registry
    folder = make_adapter(tmp_path / "adapter", registry.base)
    one, _ = await registry.publish("support", folder, actor="key:test", project_id=DEFAULT_PROJECT)
    stack.engine.load_named(one.engine_name)
    async with stack.database.write() as connection:
        resident = {"replica_id": "replica-1", "engine_name": one.engine_name, "state": "ready", "updated_at": now()}
        await connection.execute(insert(tables.residency).values(resident))
    await put_state(stack, VersionState.VERIFIED)
    return one.name


async def test_who_reads_that_a_version_is_loaded_is_answered_by_it(unfollowed: Stack, tmp_path: Path) -> None:
    name = await loaded_unseen(unfollowed, tmp_path)

    async with unfollowed.client() as admin:
        unseen = await admin.post("/v1/chat/completions", json=chat_body(model=name))
        shown = await admin.get("/api/adapters/support/versions/1")
        seen = await admin.post("/v1/chat/completions", json=chat_body(model=name))

    assert unseen.status_code == 404, "this gateway follows nothing by itself"
    assert [row["state"] for row in shown.json()["residency"]] == ["ready"]
    assert (seen.status_code, seen.headers["x-turnout-version"]) == (200, name)


async def test_what_an_operator_did_holds_for_the_next_request(unfollowed: Stack, tmp_path: Path) -> None:
    body = chat_body(model=await loaded_unseen(unfollowed, tmp_path))
    answers = []

    async with unfollowed.client() as admin:
        for what in ("retire", "restore"):
            assert (await act(admin, what)).status_code == 200
            answers.append((await admin.post("/v1/chat/completions", json=body)).status_code)
        await put_state(unfollowed, VersionState.QUARANTINED)
        await unfollowed.see()
        answers.append((await admin.post("/v1/chat/completions", json=body)).status_code)
        assert (await act(admin, "release")).status_code == 200
        released = await admin.post("/v1/chat/completions", json=body)

    assert answers == [409, 200, 409]
    assert code(released) == (503, "version_not_loaded")


@pytest.mark.parametrize("what", ["key", "retire"])
async def test_what_was_committed_is_answered_for_though_the_table_cannot_follow(
    stack: Stack, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    await stack.add_version()

    async def fails(*, anew: bool = False) -> None:
        raise Unavailable("the database is gone")

    monkeypatch.setattr(stack.gateway.table, "refresh", fails)

    if what == "key":
        made = await admin.post("/api/keys", json={"name": "later", "scopes": ["inference"]})
        assert made.status_code == 201
        assert made.json()["key"], "shown now or never"
    else:
        assert (await act(admin, what)).status_code == 200


async def nobody(connection: AsyncConnection) -> set[str]:
    return set()


async def test_bytes_go_with_the_last_version_that_has_them_and_come_back_with_a_publication(
    stack: Stack, tmp_path: Path, admin: httpx.AsyncClient
) -> None:
    services = stack.gateway.services
    folder = make_adapter(tmp_path / "adapter", services.registry.base)
    by = {"actor": "key:test", "project_id": DEFAULT_PROJECT}
    one, _ = await services.registry.publish("support", folder, **by)
    other, _ = await services.registry.publish("billing", folder, **by)
    directory = services.registry.directory(one)

    await services.retirement.retire(one.name, reason="x", **by)
    assert await services.retirement.remove_unneeded_bytes(nobody) == []
    assert (await act(admin, "restore")).json()["retired_at"] is None
    await services.retirement.retire(one.name, reason="x", **by)
    await services.retirement.retire(other.name, reason="x", **by)
    assert await services.retirement.remove_unneeded_bytes(nobody) in ([one.name], [other.name])

    assert not directory.exists()
    assert code(await act(admin, "restore")) == (409, "bytes_gone")
    again, is_new = await services.registry.publish("support", folder, **by)
    assert (again.name, again.retired_at, is_new) == (one.name, None, False)
    assert directory.exists()
    assert await services.retirement.remove_unneeded_bytes(nobody) == []


async def test_a_version_is_noted_as_used_while_and_after_it_answers(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version(version=1)
    await stack.add_version(version=2)

    assert (await admin.post("/v1/chat/completions", json=chat_body(model="support@1"))).status_code == 200
    await stack.gateway.recorder.note_uses()

    used = {row.version: row.used_at for row in await stack.rows(tables.adapter_versions)}
    assert used[1] is not None
    assert used[2] is None


# ---- Nobody looks after the engines ----


async def test_a_forced_promotion_believes_no_table_that_nobody_keeps(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version()
    await a_living_controller(stack.database, silent_s=60)

    refused = await promote(admin, "support@1", **FORCED)
    ready = await admin.get("/readyz")

    assert code(refused) == (409, "residency_unknown")
    assert "turnout serve" in refused.json()["error"]["message"]
    assert ready.status_code == 200, "requests are answered as long as an engine does"
    await stack.see()
    found = (await admin.get("/readyz")).json()
    assert found["controller"] == "silent"
    assert found["controller_silent_s"] >= 60


async def test_a_controller_that_misses_a_renewal_or_two_is_no_silent_one(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    await stack.add_version()
    await a_living_controller(stack.database, silent_s=3)

    assert (await promote(admin, "support@1", **FORCED)).status_code == 200
    await stack.see()
    assert (await admin.get("/readyz")).json()["controller"] == "ok"


async def test_without_any_lease_nothing_is_known(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version()
    async with stack.database.write() as connection:
        await connection.execute(tables.leases.delete())
    await stack.see()

    assert code(await promote(admin, "support@1", **FORCED)) == (409, "residency_unknown")
    found = (await admin.get("/readyz")).json()
    assert (found["controller"], found["controller_silent_s"]) == ("silent", None)
