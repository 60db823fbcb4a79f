"""The door: every path and method needs a key, and nothing about a request can talk its way past."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import BaseRoute, Mount

from gateway import tables
from gateway.errors import Conflict, Invalid, NotFound
from gateway.ids import now
from gateway.keys import Keys, load_pepper
from gateway.proxy import app as door
from gateway.proxy.completions import PATHS
from gateway.settings import load_settings
from tests.fakes.stack import BASE, Stack, chat_body

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
HOSTILE_KEYS = [
    "tn-",
    "tn-wrong",
    "x" * 10_000,
    "' OR '1'='1",
    "tn-'; DROP TABLE api_keys; --",
    "tn-%00",
    "tn-\x7f",
    "../../secrets/pepper",
    "é" * 50,
    "null",
]


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        yield running


def paths_of(routes: list[BaseRoute], prefix: str = "") -> Iterator[str]:
    """Every path of an application, mounts too; parameters filled with something."""
    for route in routes:
        path = prefix + str(getattr(route, "path", ""))
        if isinstance(route, Mount):
            yield from paths_of(list(route.routes), path)
            yield path + "/anything"
        yield path.replace("{", "").replace("}", "").replace(":path", "")


def every_path(api: FastAPI) -> list[str]:
    extra = [
        "/",
        "/docs",
        "/openapi.json",
        "/metrics",
        "/v1",
        "/v1/responses",
        "/v1/nothing",
        "/console",
        "/static/x.js",
    ]
    tricks = [
        "/healthz/",
        "/healthz/../v1/models",
        "//healthz",
        "/readyz/x",
        "/healthz%2f..%2fmetrics",
        "/HEALTHZ",
        "/healthz;x",
    ]
    return sorted({*paths_of(list(api.routes)), *PATHS, *extra, *tricks} - {"/healthz", "/readyz"})


@pytest.mark.invariant(9)
async def test_every_route_needs_a_key_whatever_the_method(stack: Stack) -> None:
    paths = every_path(stack.gateway.api)
    assert len(paths) > 40

    open_ones = []
    async with stack.client(None) as client:
        for path in paths:
            for method in METHODS:
                url = httpx.URL(stack.url).copy_with(raw_path=path.encode())
                response = await client.send(httpx.Request(method, url))
                if response.status_code not in (400, 401):
                    open_ones.append((method, path, response.status_code))

    assert open_ones == []
    assert stack.engine.asked == []


@pytest.mark.mutant(9)
async def test_a_route_that_was_open_would_be_seen(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "OPEN_PATHS", frozenset({"/healthz", "/readyz", "/metrics"}))

    with pytest.raises(AssertionError):
        await test_every_route_needs_a_key_whatever_the_method(stack)


async def test_health_needs_no_key_and_tells_no_secret(stack: Stack) -> None:
    async with stack.client(None) as client:
        alive, ready = await client.get("/healthz"), await client.get("/readyz")

    assert (alive.status_code, alive.json()) == (200, {"status": "alive"})
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")
    assert str(stack.settings.home) not in ready.text


@pytest.mark.invariant(9)
@pytest.mark.parametrize("key", HOSTILE_KEYS)
async def test_a_hostile_key_is_just_a_wrong_key(stack: Stack, key: str) -> None:
    headers = {b"authorization": b"Bearer " + key.encode()}
    async with stack.client(None) as client:
        statuses = [
            (await client.post("/v1/chat/completions", json=chat_body(), headers=headers)).status_code,
            (await client.get("/v1/models", headers=headers)).status_code,
            (await client.post("/api/keys", json={}, headers=headers)).status_code,
        ]

    assert set(statuses) <= {400, 401}
    assert len(await stack.rows(tables.api_keys)) == 5


@pytest.mark.parametrize("header", ["tn-raw", "Basic {key}", "Bearer", "{key}", "Bearer {key} {key}", "Bearer{key}"])
async def test_a_key_is_a_bearers(stack: Stack, header: str) -> None:
    async with stack.client(None) as client:
        response = await client.get("/v1/models", headers={"authorization": header.format(key=stack.keys["admin"])})

    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"


async def test_keys_of_one_prefix_are_not_one_another(stack: Stack) -> None:
    good = stack.keys["admin"]
    async with stack.client(None) as client:
        for forged in (good[:-1], good + "x", good[:20], good[:20] + "y" * 26, good.swapcase(), " " + good[3:]):
            response = await client.get("/v1/models", headers={"authorization": f"Bearer {forged}"})
            assert response.status_code == 401, forged


# ---- Scopes


@pytest.mark.parametrize("key", ["inference", "preview", "train", "evaluator"])
async def test_only_admins_move_traffic_and_make_keys(stack: Stack, key: str) -> None:
    await stack.add_version(is_promoted=True)
    async with stack.client(key) as client:
        answers = [
            await client.post(
                "/api/routes/support/promote", json={"target": "support@1", "force": True, "reason": "x"}
            ),
            await client.post("/api/routes/support/rollback", json={}),
            await client.put("/api/routes/support/variants", json={"variants": [{"target": BASE, "weight": 1}]}),
            await client.put("/api/routes/support/gates", json={"suites": []}),
            await client.put("/api/routes/support/candidate", json={"target": None}),
            await client.get("/api/keys"),
            await client.post("/api/keys", json={"name": "mine", "scopes": ["admin"]}),
            await client.delete("/api/keys/key-1"),
        ]

    assert {answer.status_code for answer in answers} == {403}
    assert {answer.json()["error"]["code"] for answer in answers} == {"insufficient_scope"}


@pytest.mark.parametrize("key", ["inference", "preview", "train", "evaluator", "admin"])
async def test_why_an_engine_failed_is_for_admins(stack: Stack, key: str) -> None:
    reason = f"the engine's process ended with 1; its log {stack.settings.logs_dir}/engine.log ends: token hf_secret"
    await stack.set_replica("replica-1", state="failed", reason=reason)

    async with stack.client(key) as client:
        answer = await client.get("/api/replicas")

    (shown,) = answer.json()
    assert (answer.status_code, shown["state"]) == (200, "failed")
    if key == "admin":
        assert shown["reason"] == reason
    else:
        assert shown["reason"] == "a key with scope 'admin' is told why"
        assert str(stack.settings.home) not in answer.text
        assert "hf_secret" not in answer.text


async def test_an_engine_without_a_fault_has_no_reason(stack: Stack) -> None:
    async with stack.client("inference") as client:
        (shown,) = (await client.get("/api/replicas")).json()

    assert shown["reason"] is None


async def test_a_lost_database_is_told_without_its_path(stack: Stack) -> None:
    file = stack.settings.home / "turnout.db"
    file.rename(file.with_name("aside"))
    async with stack.client("inference") as client:
        missing = await client.get("/api/replicas")
        file.write_bytes(b"")
        replaced = await client.get("/api/replicas")
    file.with_name("aside").replace(file)

    for answer in (missing, replaced):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_lost")
        assert "turnout.db" in answer.text
        assert str(stack.settings.home) not in answer.text


async def test_completions_need_inference(stack: Stack) -> None:
    _, stack.keys["trainer"] = await Keys(stack.database, load_pepper(stack.settings)).create(
        "trainer", ["train"], actor="test"
    )
    await stack.see()
    async with stack.client("trainer") as client:
        response = await client.post("/v1/chat/completions", json=chat_body())

    assert response.status_code == 403
    assert stack.engine.asked == []


# ---- Keys over HTTP


async def test_a_key_is_good_at_once_and_useless_at_once(stack: Stack) -> None:
    async with stack.client("admin") as admin:
        made = (await admin.post("/api/keys", json={"name": "new", "scopes": ["inference"]})).json()
        async with stack.client(made["key"]) as client:
            before = await client.get("/v1/models")
            revoked = await admin.delete(f"/api/keys/{made['id']}")
            after = await client.get("/v1/models")
        again = await admin.delete(f"/api/keys/{made['id']}")
        listed = (await admin.get("/api/keys")).text

    assert (before.status_code, revoked.status_code, after.status_code, again.status_code) == (200, 200, 401, 200)
    assert made["key"] not in listed
    assert '"hash"' not in listed


async def test_a_key_that_expires_is_refused_afterwards_and_its_stream_ends_well(stack: Stack) -> None:
    keys = Keys(stack.database, load_pepper(stack.settings))
    _, raw = await keys.create("brief", ["inference"], actor="test", expires_at=now() + timedelta(seconds=0.5))
    await stack.see()
    async with stack.client(raw) as client:
        stream = await client.post(
            "/v1/chat/completions", json=chat_body("fake:chunks=30 fake:delay_ms=30", stream=True)
        )
        after = await client.get("/v1/models")

    assert stream.content.endswith(b"data: [DONE]\n\n")
    assert after.status_code == 401


async def test_only_a_hash_of_a_key_is_stored(stack: Stack) -> None:
    stored = (stack.settings.home / "turnout.db").read_bytes()

    for raw in stack.keys.values():
        assert raw.encode() not in stored
        assert raw[3:].encode() not in stored
    assert (stack.settings.secrets_dir / "pepper").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "scopes", "error"),
    [
        ("", ["admin"], Invalid),
        ("x" * 77, ["admin"], Invalid),
        ("a\nb", ["admin"], Invalid),
        ("x", [], Invalid),
        ("x", ["root"], Invalid),
        ("admin", ["inference"], Conflict),
        ("admin", ["inference", "evaluate"], Conflict),
        ("anonymous", ["inference"], Invalid),
        ("anonymous", ["evaluate"], Invalid),
        ("first-admin", ["inference"], Invalid),
    ],
)
async def test_a_key_needs_a_name_of_its_own_and_known_scopes(
    stack: Stack, name: str, scopes: list[str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await Keys(stack.database, load_pepper(stack.settings)).create(name, scopes, actor="test")


@pytest.mark.parametrize("scopes", [["inference"], ["inference", "evaluate"]])
async def test_a_name_is_never_used_twice_so_nobody_inherits_what_its_key_made(stack: Stack, scopes: list[str]) -> None:
    async with stack.client("admin") as admin:
        maker = (await admin.post("/api/keys", json={"name": "maker", "scopes": ["train"]})).json()
        await stack.add_version(created_by="key:maker")
        await admin.delete(f"/api/keys/{maker['id']}")

        again = await admin.post("/api/keys", json={"name": "maker", "scopes": scopes})

    assert (again.status_code, again.json()["error"]["code"], again.json()["error"]["param"]) == (
        409,
        "key_name_taken",
        "name",
    )
    assert "choose a new name" in again.json()["error"]["message"]


async def test_what_was_made_without_keys_belongs_to_no_key(tmp_path: Path) -> None:
    async with Stack(tmp_path, auth="none") as stack, stack.client(None) as client:
        answer = await client.post("/api/keys", json={"name": "anonymous", "scopes": ["inference"]})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "key_name_reserved")


async def test_a_key_of_another_project_is_not_found(stack: Stack) -> None:
    keys = Keys(stack.database, load_pepper(stack.settings))
    made, _ = await keys.create("theirs", ["inference"], actor="test", project_id="proj_other")

    with pytest.raises(NotFound):
        await keys.revoke(made.id, "test")


async def test_making_and_revoking_keys_is_audited(stack: Stack) -> None:
    async with stack.client("admin") as admin:
        made = (await admin.post("/api/keys", json={"name": "new", "scopes": ["inference"]})).json()
        await admin.delete(f"/api/keys/{made['id']}")

    entries = [(row.actor, row.action, row.subject) for row in await stack.rows(tables.audit)]
    assert ("key:admin", "key.create", "new") in entries
    assert ("key:admin", "key.revoke", "new") in entries


def test_the_pepper_is_one_for_all_who_start_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(home=tmp_path / "home")
    settings.prepare_directories()
    first = load_pepper(settings)
    # As the loser of the race sees it: absent when it looked, there when it links.
    monkeypatch.setattr(Path, "exists", lambda self: False)

    assert load_pepper(settings) == first
    assert [file.name for file in settings.secrets_dir.iterdir()] == ["pepper"]


# ---- Hosts, and servers without keys


@pytest.mark.parametrize(
    "host", ["evil/healthz", "127.0.0.1/healthz?", "a#b", "a@b", "a b", "127.0.0.1:8321/../healthz", "\\evil", "x\ty"]
)
async def test_a_host_that_parsers_read_differently_is_refused(stack: Stack, host: str) -> None:
    async with stack.client("admin") as client:
        response = await client.get("/v1/models", headers={"host": host})

    assert response.status_code == 400


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8321", "127.0.0.1.evil.example", "10.0.0.1"])
async def test_without_keys_only_loopback_names_are_answered(tmp_path: Path, host: str) -> None:
    async with Stack(tmp_path, auth="none") as stack, stack.client(None) as client:
        response = await client.post("/v1/chat/completions", json=chat_body(), headers={"host": host})

    assert (response.status_code, response.json()["error"]["code"]) == (403, "bad_host")


async def test_without_keys_another_web_site_is_refused(tmp_path: Path) -> None:
    async with Stack(tmp_path, auth="none") as stack, stack.client(None) as client:
        statuses = {
            origin: (
                await client.post("/v1/chat/completions", json=chat_body(), headers={"origin": origin})
            ).status_code
            for origin in ("http://evil.example", "null", "http://localhost.evil.example", "http://localhost:3000")
        }

    assert statuses == {
        "http://evil.example": 403,
        "null": 403,
        "http://localhost.evil.example": 403,
        "http://localhost:3000": 200,
    }


async def test_without_keys_everyone_here_is_served_and_a_good_key_still_counts(tmp_path: Path) -> None:
    async with Stack(tmp_path, auth="none") as stack:
        await stack.add_version(is_promoted=True)
        labels = {"model": BASE, "prompt": [1], "logprobs": 1, "logprob_token_ids": [1]}
        async with stack.client(None) as nobody, stack.client("evaluator") as evaluator, stack.client("dummy") as dummy:
            answers = [
                await nobody.post("/v1/chat/completions", json=chat_body(model="support@1")),
                await dummy.post("/v1/chat/completions", json=chat_body()),
                await nobody.get("/api/keys"),
                await nobody.post("/v1/completions", json=labels),
                await evaluator.post("/v1/completions", json=labels),
            ]

    assert [answer.status_code for answer in answers] == [200, 200, 200, 403, 200]


# ---- Costs of hostile input


async def test_a_long_range_header_is_not_looked_at(stack: Stack) -> None:
    async with stack.client("admin") as client:
        whole = await client.get("/v1/models")
        response = await client.get("/v1/models", headers={"range": "bytes=" + ",".join(["0-1"] * 2500)})

    assert (response.status_code, response.content) == (200, whole.content)
    assert "content-range" not in response.headers


async def test_smuggled_framing_is_refused(stack: Stack) -> None:
    port = int(stack.url.rpartition(":")[2])
    key = stack.keys["admin"]
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
    for lines in (
        "content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        "content-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
        "content-length: -1\r\n\r\n",
        "content-length: 5x\r\n\r\nabcde",
        "transfer-encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write((head + lines).encode())
        answer = await asyncio.wait_for(reader.read(4096), 5)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 400"), (lines, answer)
    assert stack.engine.asked == []


async def test_headers_without_end_are_cut_by_size(stack: Stack) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]))
    writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n")
    line = b"x-flood: " + b"y" * 8000 + b"\r\n"
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 64 * 2**20 and not reader.at_eof():
            writer.write(line * 8)
            await writer.drain()
            sent += len(line) * 8

    assert sent < 16 * 2**20
    writer.close()


async def test_a_client_that_never_says_what_it_wants_is_cut_and_others_are_not(stack: Stack) -> None:
    port = int(stack.url.rpartition(":")[2])
    stack.server._headers_timeout_s = 0.3
    lorises = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
    for _, writer in lorises[1:]:
        writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-slow: ")
    async with stack.client("admin") as client:
        await client.get("/v1/models")

        ends = await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in lorises)), 5)

        assert ends == [b""] * 5
        assert (await client.get("/v1/models")).status_code == 200
    for _, writer in lorises:
        writer.close()
