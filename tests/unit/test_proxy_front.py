"""The front by itself: what reaches the application behind it when the server in front of it lets everything through."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.database import Database
from gateway.metrics import Metrics
from gateway.proxy.app import PRINCIPAL, Front, Lifecycle
from gateway.proxy.asgi import Headers, Message, Receive, Scope, Send
from gateway.proxy.authentication import Authenticator
from gateway.proxy.completions import Completions
from gateway.routing.table import RoutingTable


class Inner:
    """The application behind the door; it notes what gets there."""

    def __init__(self) -> None:
        self.reached: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.reached.append(scope)


async def nothing() -> None:
    """No start and no stop."""


Ask = Callable[[Scope], Awaitable[list[Message]]]


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture
def ask(inner: Inner, tmp_path: Path) -> Ask:
    """A request to a front that lets everybody in; what it sends. Completions are not asked for."""
    table = RoutingTable(Database("sqlite+aiosqlite://"), tmp_path / "snapshot.json", {})
    front = Front(
        inner,
        cast(Completions, None),
        Authenticator(table, b"p" * 32, allow_anonymous=True),
        Lifecycle(),
        Metrics(),
        loopback_only=False,
        on_start=nothing,
        on_stop=nothing,
    )

    async def asked(scope: Scope) -> list[Message]:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            sent.append(message)

        await front(scope, receive, send)
        return sent

    return asked


def a_request(*headers: tuple[bytes, bytes], path: str = "/v1/models") -> dict[str, Any]:
    given: Headers = [*headers]
    return {"type": "http", "method": "GET", "path": path, "headers": given}


async def test_one_host_is_let_through(ask: Ask, inner: Inner) -> None:
    await ask(a_request((b"host", b"one.example")))

    [scope] = inner.reached
    assert scope[PRINCIPAL].name == "anonymous"


async def test_two_hosts_are_refused_also_when_they_are_the_same(ask: Ask, inner: Inner) -> None:
    for second in (b"two.example", b"one.example"):
        start, _ = await ask(a_request((b"host", b"one.example"), (b"host", second)))
        assert start["status"] == 400

    assert inner.reached == []


async def test_a_websocket_is_closed_and_handed_to_nobody(ask: Ask, inner: Inner) -> None:
    for path in ("/v1/models", "/healthz"):
        sent = await ask({"type": "websocket", "path": path, "headers": []})
        assert sent == [{"type": "websocket.close", "code": 1008}]

    assert inner.reached == []


async def test_what_is_open_has_no_principal(ask: Ask, inner: Inner) -> None:
    await ask(a_request(path="/healthz"))

    [scope] = inner.reached
    assert PRINCIPAL not in scope
