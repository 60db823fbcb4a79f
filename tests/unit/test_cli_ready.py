"""What a waiter makes of an engine's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import StringIO
from typing import Any

import httpx
import pytest
from rich.console import Console

from gateway import cli_ready
from gateway.cli_console import Session
from gateway.cli_ready import FUTILE_STARTS, EngineWatch, Look, doing, hopeless, news, wait_ready
from gateway.client import Client
from gateway.client_models import Replica
from gateway.errors import GatewayError, Unavailable


def a_replica(state: str = "starting", **fields: Any) -> Replica:
    return Replica(id="engine-0", state=state, **fields)


def failing(failures: int, *, futile: int | None = None, reason: str = "out of memory") -> Replica:
    return a_replica(failures=failures, futile_starts=failures if futile is None else futile, last_failure=reason)


@pytest.mark.parametrize(
    ("replica", "words"),
    [
        (a_replica("starting"), "engine-0 is starting"),
        (a_replica("testing", self_test="running"), "engine-0 does its self-test"),
        (a_replica("testing", self_test="passed"), "engine-0 loads its adapters"),
        (a_replica("failed"), "engine-0 failed and will be started again"),
        (a_replica("stopped"), "engine-0 is stopped"),
    ],
)
def test_says_what_the_engine_does(replica: Replica, words: str) -> None:
    assert doing(Look("not_ready", (replica,)), has_answered=True) == words


def test_says_who_is_missing() -> None:
    assert "no server answers yet" in doing(Look("absent"), has_answered=False)
    assert "any more" in doing(Look("absent"), has_answered=True)
    assert "no engine was started yet" in doing(Look("not_ready", ()), has_answered=True)


def test_a_failure_is_told_once_with_its_reason_and_none_is_missed_between_looks() -> None:
    assert news([failing(1)], {}) == ["engine-0 failed once; the last time: out of memory"]
    assert news([failing(1)], {"engine-0": 1}) == []
    assert news([failing(4)], {"engine-0": 1}) == ["engine-0 failed 4 times in a row; the last time: out of memory"]


def test_failures_before_it_was_ready_are_no_news() -> None:
    assert news([a_replica("ready", failures=1, last_failure="x")], {}) == []


@pytest.mark.parametrize(
    ("replica", "first", "is_final"),
    [
        (failing(FUTILE_STARTS), 0, True),
        (failing(FUTILE_STARTS - 1), 0, False),
        (failing(FUTILE_STARTS + 4), FUTILE_STARTS + 4, False),  # nobody saw it happen: it may be an earlier server's
        (failing(FUTILE_STARTS + 5), FUTILE_STARTS + 4, True),
        (failing(9, futile=2), 0, False),  # an adapter was to blame, or it served in between
    ],
)
def test_is_final_after_futile_starts_that_were_seen(replica: Replica, first: int, is_final: bool) -> None:
    assert (hopeless([replica], {"engine-0": first}) is replica) is is_final


def test_another_replica_that_may_come_up_is_waited_for() -> None:
    other = Replica(id="engine-1", state="starting")

    assert hopeless([failing(FUTILE_STARTS), other], {}) is None
    assert hopeless([], {}) is None


def test_counts_of_an_earlier_server_do_not_end_the_wait_for_this_one() -> None:
    watch = EngineWatch(a_session()[0])
    for failures in (7, 7, 0, 1, 2):
        watch.check([failing(failures)])

    with pytest.raises(GatewayError) as caught:
        watch.check([failing(3, reason="no room")])

    assert caught.value.code == "engine_never_ready"
    for part in ("3 times in a row", "no room", "logs/engine-0.log", "turnout doctor"):
        assert part in caught.value.message


def a_session() -> tuple[Session, StringIO]:
    said = StringIO()
    return Session(out=Console(file=said, width=400)), said


def a_client(answers: Iterable[Callable[[httpx.Request], httpx.Response]]) -> Client:
    """`/readyz` is answered by one after the other, the last for ever; `/api/replicas` by the same."""
    script = [None, *answers]

    def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/readyz" and len(script) > 1:
            script.pop(0)
        assert script[0] is not None
        return script[0](request)

    return Client("http://turnout.test", transport=httpx.MockTransport(handler))


def gone(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


def starting(request: httpx.Request) -> httpx.Response:
    return httpx.Response(503 if request.url.path == "/readyz" else 200, json=[])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.cli_console.time.sleep", lambda seconds: None)


def test_a_server_that_answered_and_is_gone_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_ready, "GONE_AFTER_S", 0.05)
    shell, said = a_session()

    with a_client([gone, starting, starting, gone]) as client, pytest.raises(Unavailable) as caught:
        wait_ready(shell, client, timeout_s=None)

    assert caught.value.code == "server_gone"
    assert said.getvalue().splitlines()[1:] == [
        "no server answers yet (`turnout serve` starts one)",
        "no engine was started yet",
        "the server does not answer any more",
    ]


def test_a_server_that_never_comes_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_ready, "ABSENT_AFTER_S", 0.05)

    with a_client([gone]) as client, pytest.raises(Unavailable) as caught:
        wait_ready(a_session()[0], client, timeout_s=None)

    assert caught.value.code == "no_server"


def test_a_server_on_which_nothing_moves_ends_the_wait_with_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_ready, "STALLED_AFTER_S", 0.05)

    with a_client([starting]) as client, pytest.raises(GatewayError) as caught:
        wait_ready(a_session()[0], client, timeout_s=None)

    assert caught.value.code == "not_ready"
    assert "nothing moved" in caught.value.message
    assert "no engine was started yet" in caught.value.message
