"""What goes wrong in the middle: clients that leave or stall, engines that die or hang, limits of time and size."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest

from gateway import tables
from gateway.proxy.cutting import Timeouts
from tests.fakes.engine import FakeEngine
from tests.fakes.raw_engine import RawEngine, chunked
from tests.fakes.stack import BASE, Stack, chat_body, events_of, first_events, until

SHORT = Timeouts(request_s=0.4, body_s=0.3, slow_client_s=0.4)


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        yield running


def error_of(content: bytes) -> dict[str, str]:
    """The error of the last event; it must be the last, with no `[DONE]` behind it."""
    events = events_of(content)
    assert b"[DONE]" not in events
    found: dict[str, str] = json.loads(events[-1])["error"]
    return found


def raw_request(stack: Stack, body: dict[str, object], *, key: str = "inference") -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {stack.keys[key]}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def connected(stack: Stack, *, receive_buffer: int | None = None) -> socket.socket:
    made = socket.socket()
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", int(stack.url.rpartition(":")[2])))
    return made


# ---- Clients


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_the_engines_work(stack: Stack, *, stream: bool) -> None:
    body = chat_body("fake:chunks=2000 fake:delay_ms=20", stream=stream)
    made = await connected(stack)
    await asyncio.get_running_loop().sock_sendall(made, raw_request(stack, body))
    await until(lambda: stack.engine.running == 1)

    made.close()

    await until(lambda: stack.engine.cancelled == 1, timeout_s=2)
    await until(lambda: stack.gateway.lifecycle.in_flight == 0)
    count = stack.gateway.metrics.registry.get_sample_value(
        "turnout_requests_total",
        {"route": BASE, "variant": BASE, "version": BASE, "traffic": "pinned", "status": "499"},
    )
    assert count == 1


async def test_a_client_that_leaves_in_its_body_costs_nothing(stack: Stack) -> None:
    made = await connected(stack)
    await asyncio.get_running_loop().sock_sendall(made, raw_request(stack, chat_body())[:-10])
    await until(lambda: stack.gateway.lifecycle.in_flight == 1)

    made.close()

    await until(lambda: stack.gateway.lifecycle.in_flight == 0)
    assert stack.engine.asked == []


async def test_a_client_that_does_not_read_holds_up_a_bounded_buffer_and_is_cut(tmp_path: Path) -> None:
    async with Stack(tmp_path, timeouts=Timeouts(request_s=60, slow_client_s=0.4)) as stack:
        made = await connected(stack, receive_buffer=4096)
        body = chat_body("fake:chunks=200000", stream=True)
        await asyncio.get_running_loop().sock_sendall(made, raw_request(stack, body))
        await until(lambda: stack.engine.running == 1)

        await until(lambda: stack.engine.running == 0, timeout_s=20)

        assert (stack.engine.cancelled, stack.engine.completed) == (1, 0)
        await until(lambda: stack.gateway.lifecycle.in_flight == 0)
        made.close()


async def test_a_client_that_sends_its_body_drop_by_drop_is_cut(tmp_path: Path) -> None:
    async with Stack(tmp_path, timeouts=SHORT) as stack:
        made = await connected(stack)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(made, raw_request(stack, chat_body())[:-5])

        answer = await asyncio.wait_for(loop.sock_recv(made, 65536), 5)

        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body_timeout" in answer
        assert stack.engine.asked == []
        made.close()


async def test_a_body_over_the_cap_is_refused_by_its_length_and_by_its_bytes(tmp_path: Path) -> None:
    async with Stack(tmp_path, limits={"request_bytes": 2048}) as stack, stack.client("inference") as client:

        async def parts() -> AsyncIterator[bytes]:
            for _ in range(4):
                yield b"x" * 1024

        declared = await client.post("/v1/chat/completions", content=b"x" * 4096)
        chunked = await client.post("/v1/chat/completions", content=parts())
        after = await client.post("/v1/chat/completions", json=chat_body())

    assert [r.status_code for r in (declared, chunked, after)] == [413, 413, 200]
    assert declared.json()["error"]["code"] == "body_too_large"


# ---- Engines


async def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error(stack: Stack) -> None:
    async with stack.client("inference") as client:
        response = await client.post(
            "/v1/chat/completions", json=chat_body("fake:chunks=50 fake:delay_ms=5 fake:die_after=10", stream=True)
        )

    assert response.status_code == 200
    error = error_of(response.content)
    assert (error["code"], error["type"]) == ("engine_error", "server_error")
    assert len(events_of(response.content)) <= 11


async def test_the_sdk_raises_when_the_engine_dies_in_a_stream(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=stack.keys["inference"], max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": "fake:chunks=50 fake:delay_ms=5 fake:die_after=10"}],
            stream=True,
        )
        with pytest.raises(openai.APIError, match="broke off"):
            _ = [chunk async for chunk in stream]


@pytest.mark.parametrize("what", ["die_after", "drop_after"])
async def test_an_engine_that_breaks_before_the_first_event_is_told_by_the_status(stack: Stack, what: str) -> None:
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=chat_body(f"fake:{what}=0", stream=True))

    assert response.status_code == 502
    assert response.json()["error"]["code"] == "engine_error"


async def test_an_error_that_the_engine_reports_in_the_stream_is_not_followed_by_done(stack: Stack) -> None:
    async with stack.client("inference") as client:
        response = await client.post(
            "/v1/chat/completions",
            json=chat_body("fake:chunks=9 fake:delay_ms=5 fake:stream_error_after=4", stream=True),
        )

    assert error_of(response.content)["code"] == "engine_error"
    assert b"0x" not in response.content
    assert b"EngineCore" not in response.content


async def test_a_stream_that_stops_without_done_is_an_error(stack: Stack) -> None:
    async with stack.client("inference") as client:
        response = await client.post(
            "/v1/chat/completions", json=chat_body("fake:chunks=20 fake:delay_ms=2 fake:drop_after=5", stream=True)
        )

    assert error_of(response.content)["code"] == "engine_error"


async def test_a_stream_that_ends_in_good_order_without_done_is_an_error(stack: Stack) -> None:
    async with RawEngine(stack.engine.socket.with_name("raw.sock")) as engine, stack.client("inference") as client:
        await stack.set_replica("replica-1", socket=str(engine.socket), epoch="2")
        engine.play(lambda asked: chunked(asked.events[:-1]))
        response = await client.post("/v1/chat/completions", json=chat_body("hello", stream=True))

    assert response.status_code == 200
    assert error_of(response.content)["code"] == "engine_error"


async def test_an_engine_that_dies_during_an_answer_is_a_clean_error(stack: Stack) -> None:
    async with stack.client("inference") as client:
        died = await client.post("/v1/chat/completions", json=chat_body("fake:die_after=0"))
        gone = await client.post("/v1/chat/completions", json=chat_body())

    assert (died.status_code, died.json()["error"]["code"]) == (502, "engine_error")
    assert (gone.status_code, gone.json()["error"]["code"]) == (502, "engine_unreachable")


async def test_an_engine_that_came_back_is_used_at_once(stack: Stack) -> None:
    async with stack.client("inference") as client:
        await client.post("/v1/chat/completions", json=chat_body("fake:die_after=0"))
        await stack.engine.stop()
        await stack.engine.start()
        await stack.set_replica("replica-1", epoch="2")

        response = await client.post("/v1/chat/completions", json=chat_body())

    assert response.status_code == 200


async def test_without_a_ready_engine_requests_wait(stack: Stack) -> None:
    await stack.set_replica("replica-1", state="starting")
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=chat_body())
        ready = await client.get("/readyz")

    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
    assert response.headers["retry-after"] == "1"
    assert (ready.status_code, ready.json()["reason"]) == (503, "no_engine")


async def test_a_replica_that_cannot_be_reached_is_passed_over(stack: Stack, tmp_path: Path) -> None:
    gone = FakeEngine(stack.engine.socket.with_name("gone.sock"), model_name=BASE)
    await stack.add_replica("replica-0", gone)
    await stack.see()
    async with stack.client("inference") as client:
        statuses = [(await client.post("/v1/chat/completions", json=chat_body())).status_code for _ in range(4)]

    assert statuses == [200] * 4


async def test_load_is_spread_over_replicas(stack: Stack) -> None:
    other = FakeEngine(stack.engine.socket.with_name("other.sock"), model_name=BASE)
    async with other, stack.client("inference") as client:
        await stack.add_replica("replica-2", other)
        await stack.see()
        body = chat_body("fake:first_delay_ms=200")
        await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(6)))

    assert (stack.engine.completed, other.completed) == (3, 3)


@pytest.mark.parametrize("status", [400, 418, 500, 503])
async def test_nothing_of_the_engine_leaks_through_its_errors(stack: Stack, status: int) -> None:
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=chat_body(f"fake:error={status}"))

    assert response.status_code in (400, 502, 503)
    for secret in ("0x7f3a", "/models/base", "Traceback", "/usr/lib", "EngineCore"):
        assert secret not in response.text


async def test_an_answer_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    async with Stack(tmp_path, timeouts=SHORT) as stack, stack.client("inference") as client:
        silent = await client.post("/v1/chat/completions", json=chat_body("fake:first_delay_ms=60000"))
        stream = await client.post(
            "/v1/chat/completions", json=chat_body("fake:chunks=900 fake:delay_ms=50", stream=True)
        )
        await until(lambda: stack.engine.running == 0)

        assert (silent.status_code, silent.json()["error"]["code"]) == (504, "request_timeout")
        assert error_of(stream.content)["code"] == "request_timeout"
        assert stack.engine.cancelled == 2


async def test_connections_to_the_engine_are_used_again(stack: Stack) -> None:
    async with stack.client("inference") as client:
        for number in range(10):
            await client.post("/v1/chat/completions", json=chat_body(stream=number % 2 == 0))

        assert stack.engine.connections == 1


async def test_a_cut_stream_does_not_spoil_a_connection(stack: Stack) -> None:
    async with stack.client("inference") as client:
        async with client.stream(
            "POST", "/v1/chat/completions", json=chat_body("fake:chunks=500 fake:delay_ms=5", stream=True)
        ) as response:
            assert len(await first_events(response, 3)) >= 3
        await until(lambda: stack.engine.cancelled == 1)

        after = await client.post("/v1/chat/completions", json=chat_body("next"))

    assert after.status_code == 200


async def test_requests_side_by_side_get_their_own_answers(stack: Stack) -> None:
    version = await stack.add_version(is_promoted=True)
    async with stack.client("inference", limits=httpx.Limits(max_connections=40)) as client:

        async def one(number: int) -> None:
            model, engine_name = (BASE, BASE) if number % 2 else ("support@1", version.engine_name)
            body = chat_body(f"fake:delay_ms=1 prompt {number}", model=model, stream=number % 3 == 0)
            response = await client.post("/v1/chat/completions", json=body)
            assert response.status_code == 200
            assert f'"content":"{engine_name}' in response.text
            seen.append(response.headers["x-request-id"])

        seen: list[str] = []
        await asyncio.gather(*(one(number) for number in range(120)))

    assert len(set(seen)) == 120


# ---- The recorder


async def test_exposures_wait_while_the_database_is_busy_and_are_stored_after(stack: Stack) -> None:
    await stack.add_version(is_promoted=True)
    async with stack.client("inference") as client:
        async with stack.database.write():
            for number in range(5):
                response = await client.post("/v1/chat/completions", json=chat_body(f"{number}", model="support"))
                assert response.status_code == 200
            assert stack.gateway.recorder.queued == 5
        await until(lambda: stack.gateway.recorder.queued == 0)

    assert len(await stack.rows(tables.exposures)) == 5


async def test_stopping_stores_what_is_queued(stack: Stack) -> None:
    await stack.add_version(is_promoted=True)
    async with stack.client("inference") as client:
        for number in range(5):
            await client.post("/v1/chat/completions", json=chat_body(f"{number}", model="support"))

    await stack.stop()

    assert len(await stack.rows(tables.exposures)) == 5


async def test_a_full_queue_drops_and_counts(stack: Stack) -> None:
    await stack.add_version(is_promoted=True)
    recorder = stack.gateway.recorder
    recorder._max_queued = 2
    async with stack.database.write(), stack.client("inference") as client:
        for number in range(5):
            await client.post("/v1/chat/completions", json=chat_body(f"{number}", model="support"))

        assert recorder.queued == 2
    assert stack.gateway.metrics.registry.get_sample_value("turnout_exposures_dropped_total") == 3


# ---- Stopping


async def test_draining_answers_what_is_open_and_refuses_what_is_new(stack: Stack) -> None:
    async with stack.client("inference") as client:
        body = chat_body("fake:chunks=20 fake:delay_ms=30", stream=True)
        open_stream = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: stack.engine.running == 1)

        stack.server.handle_exit(15, None)
        ready = await client.get("/readyz")
        refused = await client.post("/v1/chat/completions", json=chat_body())
        finished = await open_stream

    assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
    assert events_of(finished.content)[-1] == b"[DONE]"
    await stack.stop()


async def test_draining_ends_and_tells_streams_that_are_left(tmp_path: Path) -> None:
    async with Stack(tmp_path, drain_timeout_s=0.3) as stack, stack.client("inference") as client:
        body = chat_body("fake:chunks=2000 fake:delay_ms=20", stream=True)
        open_stream = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await until(lambda: stack.engine.running == 1)

        stack.server.handle_exit(15, None)
        cut = await open_stream

        assert error_of(cut.content)["code"] == "shutting_down"
        await until(lambda: stack.engine.cancelled == 1)
        await stack.stop()
