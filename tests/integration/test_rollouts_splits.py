"""Splitting a route's traffic: who may get a share, and what a rollback takes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from gateway.rollouts import promotion
from tests.fakes.stack import BASE, Stack
from tests.rollouts_world import (
    FORCED,
    add_suites,
    audited,
    code,
    current_digest,
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


async def test_a_split_is_checked_and_audited(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version("support", 1)
    path = "/api/routes/support/variants"
    for variants, expected in [
        ([], (400, "no_weight")),
        ([{"target": BASE, "weight": 0}], (400, "no_weight")),
        ([{"target": BASE, "weight": 1}] * 2, (400, "duplicate_variant")),
        ([{"target": "support@9", "weight": 1}], (400, "not_a_version")),
        ([{"target": "other@1", "weight": 1}], (400, "not_a_version")),
        ([{"target": "gpt-4", "weight": 1}], (400, "unknown_target")),
        ([{"target": BASE, "weight": -1}], (400, "invalid_request")),
        ([{"target": BASE, "weight": 1.5}], (400, "invalid_request")),
    ]:
        assert code(await admin.put(path, json={"variants": variants})) == expected

    arms = [{"target": "support@1", "weight": 50}, {"target": BASE, "weight": 50}]
    stale = await split(admin, arms, expected_revision=99)
    unexplained = await split(admin, arms, force=True)
    done = await split(admin, arms, expected_revision=1, force=True, reason="try it")

    assert code(stale) == (409, "route_moved")
    assert code(unexplained) == (400, "reason_required")
    assert (done.status_code, done.json()["revision"]) == (200, 2)
    [entry] = await audited(stack, "route.set_variants")
    assert (entry.reason, entry.after["variants"], entry.after["force"]) == ("try it", arms, True)


@pytest.mark.invariant(6)
async def test_a_version_gets_a_larger_share_only_by_its_gates(stack: Stack, admin: httpx.AsyncClient) -> None:
    version = await stack.add_version("support", 1)
    arms = [{"target": "support@1", "weight": 10}, {"target": BASE, "weight": 90}]
    assert code(await split(admin, arms)) == (422, "no_gate")
    await admin.put("/api/routes/support/gates", json={"suites": ["target"]})
    assert code(await split(admin, arms)) == (422, "gate_missing")
    digest = await current_digest(stack, "target")
    await stack.add_verdict(version, "target", "failed", suite_digest=digest, id="verdict-1")
    assert code(await split(admin, arms)) == (422, "gate_failed")
    assert (await admin.get("/api/routes/support")).json()["variants"] == [{"target": BASE, "weight": 100}]

    await stack.add_verdict(version, "target", "passed", suite_digest=digest, id="verdict-2", baseline="a" * 64)
    assert code(await split(admin, arms)) == (422, "gate_failed")
    await stack.add_verdict(version, "target", "passed", suite_digest=digest, id="verdict-3", fingerprint="0" * 64)

    assert (await split(admin, arms)).status_code == 200


async def test_a_share_is_taken_away_without_any_condition(stack: Stack, admin: httpx.AsyncClient) -> None:
    version = await stack.add_version("support", 1)
    await split(admin, [{"target": "support@1", "weight": 50}, {"target": BASE, "weight": 50}], **FORCED)
    await stack.unload(version)

    less = await split(admin, [{"target": "support@1", "weight": 5}, {"target": BASE, "weight": 95}])
    more = await split(admin, [{"target": "support@1", "weight": 5}, {"target": BASE, "weight": 90}])

    assert less.status_code == 200
    assert code(more) == (409, "not_resident")


async def test_a_suite_that_is_gone_stops_neither_force_nor_a_step_back(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version("support", 1)
    await admin.put("/api/routes/support/gates", json={"suites": ["target"]})
    (stack.settings.suites_dir / "target" / "suite.yaml").unlink()
    (stack.settings.suites_dir / "target").rmdir()

    even = [{"target": "support@1", "weight": 50}, {"target": BASE, "weight": 50}]
    refused = await split(admin, even)
    forced = await split(admin, even, **FORCED)
    less = await split(admin, [{"target": "support@1", "weight": 5}, {"target": BASE, "weight": 95}])
    promotion_forced = await promote(admin, "support@1", **FORCED)

    assert refused.status_code == 404
    assert [answer.status_code for answer in (forced, less, promotion_forced)] == [200, 200, 200]


@pytest.mark.invariant(6)
async def test_what_became_stable_by_its_gates_gets_a_share_again_without_them(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    gated = await stack.add_version("support", 1)
    await admin.put("/api/routes/support/gates", json={"suites": ["target"]})
    await stack.add_verdict(gated, "target", "passed", suite_digest=await current_digest(stack, "target"))
    assert (await promote(admin, "support@1")).status_code == 200
    await promoted(stack, admin, 2, 3)

    by_gate = await split(admin, [{"target": "support@1", "weight": 10}, {"target": "support@3", "weight": 90}])
    by_force = await split(admin, [{"target": "support@2", "weight": 10}, {"target": "support@3", "weight": 90}])

    assert by_gate.status_code == 200
    assert code(by_force) == (422, "gate_missing")


@pytest.mark.mutant(6)
async def test_a_share_without_gates_would_be_seen(
    stack: Stack, admin: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unguarded(*arguments: object, **options: object) -> None:
        return None

    monkeypatch.setattr(promotion, "check_gates", unguarded)

    with pytest.raises((AssertionError, KeyError)):
        await test_a_version_gets_a_larger_share_only_by_its_gates(stack, admin)


@pytest.mark.invariant(7)
async def test_a_rollback_takes_back_what_a_split_tries_then_what_was_promoted(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    await promoted(stack, admin, 1)
    await stack.add_version("support", 2)
    arms = [{"target": "support@1", "weight": 1}, {"target": "support@2", "weight": 99}]
    assert (await split(admin, arms, **FORCED)).status_code == 200

    first = (await roll_back(admin)).json()
    again = await split(admin, arms)
    pressed_twice = await roll_back(admin)
    second = (await roll_back(admin, further=True)).json()

    assert (first["moved_from"], first["moved_to"], first["route"]["stable"]) == ("support@2", "support@1", "support@1")
    assert first["route"]["variants"] == [{"target": "support@1", "weight": 100}]
    assert code(again) == (422, "rolled_back")
    assert code(pressed_twice) == (409, "already_rolled_back")
    assert (second["moved_from"], second["moved_to"]) == ("support@1", BASE)


@pytest.mark.invariant(7)
async def test_a_rollback_ends_a_split_over_base(stack: Stack, admin: httpx.AsyncClient) -> None:
    await stack.add_version("support", 1)
    await split(admin, [{"target": BASE, "weight": 50}, {"target": "support@1", "weight": 50}], **FORCED)

    moved = (await roll_back(admin)).json()

    assert (moved["moved_from"], moved["moved_to"], moved["needs_load"]) == ("support@1", BASE, False)
    assert code(await roll_back(admin)) == (409, "nothing_to_roll_back")


async def test_a_route_says_what_it_tries_since_when_and_against_what(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1)
    await stack.add_version("support", 2)
    arms = [
        {"target": "support@1", "weight": 80},
        {"target": "support@2", "weight": 10},
        {"target": BASE, "weight": 10},
    ]

    every_arm = (await split(admin, arms, **FORCED)).json()
    named = (await split(admin, arms, tries=["support@2"], **FORCED)).json()
    same = (await split(admin, [arms[0] | {"weight": 50}, *arms[1:]], tries=["support@2"], **FORCED)).json()
    none = (await split(admin, arms, tries=[], **FORCED)).json()

    assert every_arm["trial"] == {"arms": ["support@2", BASE], "against": "support@1", "since_revision": 3}
    assert named["trial"] == {"arms": ["support@2"], "against": "support@1", "since_revision": 4}
    assert same["trial"] == named["trial"]
    assert none["trial"] is None
    assert (none["before"]["trial"], none["before"]["revision"]) == (named["trial"], same["revision"])
    assert (none["last_move"]["action"], none["last_move"]["by"]) == ("split", "key:admin")
    assert code(await split(admin, arms, tries=["support@1"], **FORCED)) == (400, "trial_of_stable")
    assert code(await split(admin, arms, tries=["support@9"], **FORCED)) == (400, "trial_without_share")


@pytest.mark.invariant(7)
async def test_a_bad_stable_goes_and_the_innocent_newer_version_stays_unmarked(
    stack: Stack, admin: httpx.AsyncClient
) -> None:
    await promoted(stack, admin, 2, 3)
    await stack.add_version("support", 4)
    arms = [{"target": "support@3", "weight": 90}, {"target": "support@4", "weight": 10}]
    await split(admin, arms, **FORCED)

    shown = (await roll_back(admin, dry_run=True)).json()
    moved = (await roll_back(admin, to="support@previous")).json()

    assert (shown["dry_run"], shown["moved_from"], shown["moved_to"]) == (True, "support@4", "support@3")
    assert (moved["moved_from"], moved["moved_to"], moved["marked"]) == ("support@3", "support@2", ["support@3"])
    assert moved["route"]["trial"] is None
    assert await split(admin, [{"target": "support@2", "weight": 9}, {"target": "support@4", "weight": 1}], **FORCED)


async def test_a_dry_run_moves_nothing_and_shows_before_and_after(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1, 2)
    before = (await admin.get("/api/routes/support")).json()
    arms = [{"target": "support@1", "weight": 1}, {"target": "support@2", "weight": 1}]

    shown = [
        (await roll_back(admin, dry_run=True)).json(),
        (await promote(admin, "support@1", dry_run=True, **FORCED)).json(),
        (await split(admin, arms, dry_run=True, **FORCED)).json(),
    ]

    assert [each["dry_run"] for each in shown] == [True, True, True]
    assert [each["before"] for each in shown] == [before, before, before]
    assert [each["route"]["stable"] for each in shown[:2]] == ["support@1", "support@1"]
    assert shown[2]["variants"] == arms
    assert (await admin.get("/api/routes/support")).json() == before
    assert await audited(stack, "route.rollback") == []
    assert code(await promote(admin, "support@9", dry_run=True, **FORCED)) == (400, "not_a_version")


async def test_base_beside_stable_is_a_trial_that_a_rollback_ends(stack: Stack, admin: httpx.AsyncClient) -> None:
    await promoted(stack, admin, 1)
    await split(admin, [{"target": "support@1", "weight": 50}, {"target": BASE, "weight": 50}])

    moved = (await roll_back(admin)).json()

    assert (moved["moved_from"], moved["moved_to"], moved["marked"]) == (BASE, "support@1", [])
