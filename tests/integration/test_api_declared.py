"""Every route says who may call it and what it takes, and both are held before anybody's body is read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from pydantic import BaseModel

from gateway.api.declared import MAX_ELEMENTS, MAX_JSON_BYTES, DeclaredRoute
from gateway.api.errors import MAX_TOLD
from gateway.app import Gateway
from gateway.proxy.app import OPEN_PATHS
from gateway.proxy.asgi import Message
from gateway.proxy.completions import PATHS
from tests.fakes.stack import Stack

MOST_OF_AN_ERROR = 4_096
MOST_OF_A_QUOTE = 700
PARAMETERS = {
    "name": "support", "number": "1", "job_id": "ftjob-1", "key_id": "key-1", "file_id": "file-1", "model": "tiny",
}  # fmt: skip
HOSTILE_BODIES = {
    "nothing": b"",
    "not json": b"{",
    "not utf-8": b'{"name": "\xff"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a list": b"[]",
    "a text": b'"x"',
    "null": b"null",
    "NaN": b'{"name": NaN}',
    "Infinity": b'{"name": -Infinity}',
    "half a surrogate": b'{"name": "\\ud800"}',
    "a number beyond doubles": b'{"name": 1e999}',
    "a number of 4,000 digits": b'{"name": ' + b"9" * 4_000 + b"}",
    "200 levels": b'{"name": ' + b"[" * 200 + b"]" * 200 + b"}",
    "20,000 levels": b"[" * 20_000 + b"]" * 20_000,
    "a name twice": b'{"name": 1, "name": "x"}',
    "as many elements as fit": b"[" + b",".join([b"0"] * 30_000) + b"]",
    "as many fields as fit": b"{" + b",".join(b'"%d":0' % number for number in range(6_000)) + b"}",
    "a list of lists": b"[" + b",".join([b"[]"] * 1_000) + b"]",
    "one long field name": b'{"' + b"x" * 60_000 + b'": 1}',
}
AS_JSON = {"content-type": "application/json"}
GOOD_VALUES = {
    "name": "k", "scopes": ["inference"], "target": "support@1", "suite": "s", "suites": [], "model": "tiny", "training_file": "file-1",
    "variants": [{"target": "tiny", "weight": 1}], "reason": "test", "force": True,
}  # fmt: skip
# What any field may get; what none of them survives would be a 500.
HOSTILE_VALUES: list[Any] = [
    None, True, -1, 2**63, 2**64 - 1, 1e300, "", "x" * 10_000, "\x7f", "%00", "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00+14:00",
    [], [[]], [None] * 900, ["x" * 10_000], {}, {"x" * 10_000: {}}, {str(number): "x" for number in range(900)},
    [{"target": "x", "weight": 2**63}], [{"target": "x" * 5_000, "weight": 1}] * 10,
]  # fmt: skip


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        await running.add_version()
        yield running


def routes_of(gateway: Gateway) -> list[DeclaredRoute]:
    return [route for route in gateway.api.routes if isinstance(route, DeclaredRoute)]


def path_of(route: APIRoute) -> str:
    return route.path.format(**PARAMETERS)


def method_of(route: APIRoute) -> str:
    return min(route.methods or {"GET"})


class Asking:
    """One request to the door itself, whose body never comes; how often it was asked for is counted."""

    def __init__(self) -> None:
        self.asked = 0
        self.status = 0
        self.body = b""

    async def receive(self) -> Message:
        self.asked += 1
        await asyncio.Event().wait()
        raise AssertionError("nothing comes")

    async def send(self, message: Message) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")

    async def ask(
        self, gateway: Gateway, method: str, path: str, key: str | None, *headers: tuple[bytes, bytes]
    ) -> None:
        authorization = [(b"authorization", f"Bearer {key}".encode())] if key else []
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 9),
            "headers": [(b"host", b"127.0.0.1"), *authorization, *headers], "state": {},
        }  # fmt: skip
        await asyncio.wait_for(gateway.front(scope, self.receive, self.send), 10)


JSON = (b"content-type", b"application/json")
FORM = (b"content-type", b"multipart/form-data; boundary=B")
CHUNKED = (b"transfer-encoding", b"chunked")


# ---- Declarations


async def test_every_route_is_declared(stack: Stack) -> None:
    undeclared = [route for route in stack.gateway.api.routes if isinstance(route, APIRoute)]

    assert [route.path for route in undeclared if not isinstance(route, DeclaredRoute)] == []
    assert {"nothing", "json", "form"} == {route.takes for route in routes_of(stack.gateway)}
    assert {None, "train", "admin"} == {route.scope for route in routes_of(stack.gateway)}


def test_a_route_that_names_no_caller_cannot_be_made() -> None:
    router = APIRouter(route_class=DeclaredRoute)

    async def anybody() -> None:
        return None

    with pytest.raises(TypeError, match="names no caller"):
        router.get("/api/secrets")(anybody)


@pytest.mark.parametrize("header", [JSON, FORM, (b"content-type", b"text/plain")])
async def test_who_has_no_key_is_answered_before_a_byte_is_asked_for(stack: Stack, header: tuple[bytes, bytes]) -> None:
    paths = [(method_of(route), path_of(route)) for route in routes_of(stack.gateway)] + [
        ("POST", path) for path in PATHS
    ]
    seen = {}
    for method, path in paths:
        if path not in OPEN_PATHS:
            asking = Asking()
            await asking.ask(stack.gateway, method, path, "tn-nobody", header, CHUNKED)
            seen[method, path] = (asking.status, asking.asked)

    assert len(seen) > 25
    assert {found: key for key, found in seen.items()}.keys() == {(401, 0)}


async def test_whose_key_reaches_less_far_is_answered_before_a_byte_is_asked_for(stack: Stack) -> None:
    seen = {}
    for route in routes_of(stack.gateway):
        if route.scope is not None:
            asking = Asking()
            await asking.ask(
                stack.gateway, method_of(route), path_of(route), stack.keys["inference"], JSON if route.takes != "form" else FORM, CHUNKED
            )  # fmt: skip
            seen[method_of(route), route.path] = (asking.status, asking.asked)

    assert len(seen) > 20
    assert set(seen.values()) == {(403, 0)}


async def test_a_completion_with_a_key_that_may_not_is_answered_before_a_byte_is_asked_for(stack: Stack) -> None:
    made = await stack.gateway.keys.create("trainer", ["train"], actor="test")
    await stack.see()
    for path in PATHS:
        asking = Asking()
        await asking.ask(stack.gateway, "POST", path, made[1], JSON, CHUNKED)

        assert (asking.status, asking.asked) == (403, 0)


@pytest.mark.parametrize("auth", ["keys", "none"])
async def test_a_body_that_says_it_is_too_large_is_refused_before_a_byte_is_asked_for(
    tmp_path: Path, auth: str
) -> None:
    async with Stack(tmp_path, auth=auth) as stack:
        length = (b"content-length", b"%d" % (MAX_JSON_BYTES + 1))
        seen = {}
        for route in routes_of(stack.gateway):
            if route.takes != "form" and route.path not in OPEN_PATHS and method_of(route) not in ("GET", "DELETE"):
                asking = Asking()
                await asking.ask(stack.gateway, method_of(route), path_of(route), stack.keys["admin"], JSON, length)
                seen[route.path] = (asking.status, asking.asked)

    assert len(seen) > 8
    assert set(seen.values()) == {(413, 0)}


@pytest.mark.parametrize("length", [b"9" * 5_000, b"-1", b"1_0", b"\xb2", b""])
async def test_a_length_that_is_none_is_refused(stack: Stack, length: bytes) -> None:
    asking = Asking()
    await asking.ask(stack.gateway, "POST", "/api/keys", stack.keys["admin"], JSON, (b"content-length", length))

    assert (asking.status, asking.asked) == (413, 0)


async def test_what_takes_no_body_asks_for_none(stack: Stack) -> None:
    asking = Asking()
    await asking.ask(stack.gateway, "GET", "/v1/models", stack.keys["admin"], JSON, CHUNKED)

    assert (asking.status, asking.asked) == (200, 0)


# ---- Heads


async def test_a_nul_in_a_url_is_refused(stack: Stack) -> None:
    async with stack.client("admin") as client:
        answers = [
            await client.get("/api/audit?subject=a%00b"),
            await client.get("/v1/files?after=%00"),
        ]
        # What is encoded in a path stays so: there it is three harmless characters of a name that does not exist.
        paths = [await client.get("/v1/models/a%00b"), await client.delete("/api/keys/%00")]

    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in answers} == {(400, "bad_character")}
    assert {answer.status_code for answer in paths} == {404}


async def test_a_long_name_in_a_url_is_quoted_in_part(stack: Stack) -> None:
    name, wrong = "x" * 3_000, []
    async with stack.client("admin") as client:
        for route in routes_of(stack.gateway):
            path = route.path.format(**dict.fromkeys(PARAMETERS, name))
            query = dict.fromkeys(query_of(route)[:2], name)
            known = {
                key: value for key, value in GOOD_VALUES.items() if route.takes == "json" and key in fields_of(route)
            }
            answer = await client.request(method_of(route), path, params=query, json=known)
            if answer.status_code >= 500 or (answer.status_code >= 400 and len(answer.content) > MOST_OF_A_QUOTE):
                wrong.append((route.path, answer.status_code, answer.text[:100]))

    assert wrong == []


# ---- Bodies


def query_of(route: APIRoute) -> list[str]:
    return [field.alias for field in route.dependant.query_params]


def fields_of(route: DeclaredRoute) -> list[str]:
    """The fields of the model that a JSON body is read as."""
    assert route.body_field is not None
    model = route.body_field.field_info.annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return list(model.model_fields)


def json_routes(gateway: Gateway) -> Iterator[DeclaredRoute]:
    return (route for route in routes_of(gateway) if route.takes == "json")


async def test_a_hostile_body_gets_an_honest_400_and_a_short_one(stack: Stack) -> None:
    wrong = []
    async with stack.client("admin") as client:
        for route in json_routes(stack.gateway):
            for said, content in HOSTILE_BODIES.items():
                answer = await client.request(method_of(route), path_of(route), content=content, headers=AS_JSON)
                if (
                    answer.status_code != 400
                    or not answer.json()["error"]["message"]
                    or len(answer.content) > MOST_OF_AN_ERROR
                ):
                    wrong.append((route.path, said, answer.status_code, answer.text[:100]))

    assert wrong == []


async def test_a_hostile_value_in_any_field_fails_nothing(stack: Stack) -> None:
    wrong = []
    async with stack.client("admin") as client:
        for route in json_routes(stack.gateway):
            for name in fields_of(route):
                good = {key: value for key, value in GOOD_VALUES.items() if key in fields_of(route)}
                for value in HOSTILE_VALUES:
                    answer = await client.request(method_of(route), path_of(route), json={**good, name: value})
                    if answer.status_code >= 500 or (
                        answer.status_code >= 400 and len(answer.content) > MOST_OF_AN_ERROR
                    ):
                        wrong.append((route.path, name, repr(value)[:40], answer.status_code, answer.text[:100]))

    assert wrong == []


async def test_a_nul_in_a_text_is_refused(stack: Stack) -> None:
    async with stack.client("admin") as client:
        answers = [
            await client.post("/api/keys", json={"name": "a\0", "scopes": ["inference"]}),
            await client.put("/api/routes/support/candidate", json={"target": None, "reason": "\0"}),
            await client.post(
                "/v1/fine_tuning/jobs", json={"model": "m", "training_file": "f", "metadata": {"\0": "x"}}
            ),
        ]

    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in answers} == {(400, "bad_character")}


async def test_a_body_of_too_many_elements_is_refused_by_their_number(stack: Stack) -> None:
    async with stack.client("admin") as client:
        answer = await client.post("/api/keys", json={"name": "x", "scopes": [0] * MAX_ELEMENTS})

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many")
    assert f"{MAX_ELEMENTS:,} elements" in answer.json()["error"]["message"]


async def test_the_first_ten_errors_are_told(stack: Stack) -> None:
    extra = {f"field_{number:02}": number for number in range(40)}
    async with stack.client("admin") as client:
        answer = await client.post("/api/keys", json={"name": "x", "scopes": ["inference"], **extra})

    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "field_00")
    assert [f"field_{number:02}" in error["message"] for number in range(40)] == [True] * MAX_TOLD + [False] * 30
    assert error["message"].endswith("and 30 more")


async def test_of_a_name_that_comes_twice_the_last_counts(stack: Stack) -> None:
    async with stack.client("admin") as client:
        content = b'{"name": 5, "name": "twice", "scopes": ["inference"]}'
        answer = await client.post("/api/keys", content=content, headers={"content-type": "application/json"})

    assert (answer.status_code, answer.json()["name"]) == (201, "twice")
