from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway import client_wire
from gateway.client import Client, split_target
from gateway.errors import (
    Conflict,
    Forbidden,
    GatewayError,
    Invalid,
    NotFound,
    Refused,
    StorageFull,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UpstreamFailed,
)

AT = "2026-11-21T03:00:00Z"
VERSION: dict[str, Any] = {
    "full_name": "support@1",
    "adapter": "support",
    "version": 1,
    "digest": "a" * 64,
    "base_model": "smollm2-135m",
    "rank": 16,
    "size_bytes": 100,
    "state": "verified",
    "created_at": AT,
    "created_by": "key:admin",
    "residency": [{"replica_id": "local-0", "state": "ready"}],
    "colour": "a field of a newer server",
}
Handler = Callable[[httpx.Request], httpx.Response]


def a_client(handler: Handler, api_key: str | None = "tn-secret") -> Client:
    return Client("http://turnout.test", api_key, transport=httpx.MockTransport(handler))


def answering(status: int, body: object) -> Handler:
    return lambda request: httpx.Response(status, json=body)


def test_sends_the_key_and_reads_a_version_with_fields_it_does_not_know() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=VERSION)

    with a_client(handler) as client:
        version = client.version("support@1")

    assert seen[0].url.path == "/api/adapters/support/versions/1"
    assert seen[0].headers["authorization"] == "Bearer tn-secret"
    assert version.full_name == "support@1"
    assert version.is_resident
    assert version.model_dump()["colour"] == "a field of a newer server"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Invalid),
        (401, Unauthenticated),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (413, TooLarge),
        (422, Refused),
        (429, Unavailable),
        (500, UpstreamFailed),
        (502, UpstreamFailed),
        (503, Unavailable),
        (507, StorageFull),
    ],
)
def test_raises_the_servers_message_and_code(status: int, kind: type[GatewayError]) -> None:
    body = {"error": {"message": "what happened", "type": "t", "param": "target", "code": "gate_failed"}}

    with a_client(answering(status, body)) as client, pytest.raises(kind) as raised:
        client.routes()

    assert type(raised.value) is kind
    assert (raised.value.message, raised.value.code, raised.value.param) == ("what happened", "gate_failed", "target")


@pytest.mark.parametrize("body", ["<html>", '{"error": "text"}', "[]", "null"])
def test_an_error_that_is_not_turnouts_names_address_and_status(body: str) -> None:
    with a_client(lambda request: httpx.Response(502, text=body)) as client, pytest.raises(UpstreamFailed) as raised:
        client.routes()

    assert "http://turnout.test/api/routes answered 502" in raised.value.message


@pytest.mark.parametrize("body", ["not json", '[{"name": "support"}]', '{"data": [1]}'])
def test_an_answer_that_cannot_be_read_is_an_error_and_not_a_crash(body: str) -> None:
    with a_client(lambda request: httpx.Response(200, text=body)) as client, pytest.raises(UpstreamFailed) as raised:
        client.routes()

    assert raised.value.code == "unreadable_answer"


def test_no_server_says_how_to_start_one() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unavailable) as raised:
        client.routes()

    assert raised.value.code == "no_server"
    assert "turnout serve" in raised.value.message


def test_a_move_whose_reply_is_lost_is_sent_again_under_the_same_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_wire, "REPEAT_AFTER_S", (0.0,) * 3)
    sent: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        raise httpx.ReadError("cut", request=request)

    with a_client(handler) as client, pytest.raises(UpstreamFailed) as raised:
        client.rollback("support")

    assert len(sent) == 4
    assert len({request.headers["idempotency-key"] for request in sent}) == 1
    assert sent[0].headers["idempotency-key"] in raised.value.message


def test_a_refused_move_is_sent_once() -> None:
    sent = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        return httpx.Response(503, json={"error": {"message": "busy", "code": "database_busy"}})

    with a_client(handler) as client, pytest.raises(Unavailable):
        client.promote("support", "support@2")

    assert len(sent) == 1


def test_a_request_that_may_have_arrived_is_not_sent_again() -> None:
    sent = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(request)
        raise httpx.ReadTimeout("slow", request=request)

    with a_client(handler) as client, pytest.raises(Unavailable) as raised:
        client.create_key("ci", ["inference"])

    assert raised.value.code == "timeout"
    assert len(sent) == 1


@pytest.mark.parametrize("url", ["turnout.test", "ftp://turnout.test", "http://", "http://h:port"])
def test_a_url_that_is_none_is_refused_by_name(url: str) -> None:
    with pytest.raises(Invalid, match="is not an http URL"):
        Client(url)


def test_publishes_the_files_of_a_bundle_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 16}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "optimizer.pt").write_bytes(b"never sent")
    bodies: list[bytes] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        return httpx.Response(201, json=VERSION)

    with a_client(handler) as client:
        client.publish("support", tmp_path)

    assert b'name="adapter_config"; filename="adapter_config.json"' in bodies[0]
    assert b'name="adapter_model"; filename="adapter_model.safetensors"' in bodies[0]
    assert b"manifest" not in bodies[0]
    assert b"never sent" not in bodies[0]


def test_a_folder_without_weights_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    with a_client(answering(500, {})) as client, pytest.raises(Invalid) as raised:
        client.publish("support", tmp_path)

    assert raised.value.code == "not_a_bundle"
    assert "adapter_model.safetensors" in raised.value.message


def test_leaves_out_what_was_not_said() -> None:
    bodies: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.read()))
        return httpx.Response(409, json={"error": {"message": "moved", "code": "route_moved"}})

    with a_client(handler) as client, pytest.raises(Conflict):
        client.set_variants("support", {"support@1": 1}, reason=None)

    assert bodies == [{"variants": [{"target": "support@1", "weight": 1}]}]


def test_a_chat_carries_the_headers_that_prove_who_answered() -> None:
    headers = {"x-turnout-route": "support", "x-turnout-variant": "support@1", "x-turnout-version": "support@1"}
    headers |= {"x-turnout-digest": "a" * 64, "x-request-id": "req-1"}
    body = {"choices": [{"message": {"content": "{}"}}], "usage": {"total_tokens": 3}}

    with a_client(lambda request: httpx.Response(200, json=body, headers=headers)) as client:
        answer = client.chat("support", "hello", user="u1")

    assert (answer.text, answer.version, answer.request_id) == ("{}", "support@1", "req-1")


def test_a_chat_without_choices_is_an_error_and_not_a_crash() -> None:
    with a_client(answering(200, {"choices": []})) as client, pytest.raises(UpstreamFailed):
        client.chat("support", "hello")


def test_is_not_ready_when_nothing_listens() -> None:
    with Client("http://127.0.0.1:9") as client:
        assert not client.is_ready()


@pytest.mark.parametrize("target", ["support", "support@", "@1", "support@latest", "support@1@2"])
def test_refuses_what_names_no_version(target: str) -> None:
    with pytest.raises(Invalid, match="support@1"):
        split_target(target)
