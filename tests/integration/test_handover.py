"""The listening socket goes from a gateway that drains to the next one: nobody is refused, no stream is cut."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import pytest

from gateway.errors import Invalid
from gateway.handover import Offer, Place, handover_path, listening_socket
from gateway.settings import Settings, load_settings
from tests.engine_world import an_engine_world
from tests.fakes.stack import Stack, until

from .test_engine_supervisor import Server

LONG = "fake:chunks=600 fake:delay_ms=100"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    found = load_settings(home=tmp_path, port=free_port())
    found.prepare_directories()
    return found


@pytest.fixture
def listening(settings: Settings) -> Iterator[socket.socket]:
    with listening_socket(settings) as bound:
        bound.listen()
        yield bound


async def takes(settings: Settings) -> socket.socket:
    place = await asyncio.to_thread(Place, settings)
    return await asyncio.to_thread(place.take)


# ---- With real processes


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with an_engine_world(tmp_path) as world:
        world.settings = world.settings.model_copy(update={"port": free_port(), "drain_timeout_s": 120.0})
        made = Server(world)
        try:
            yield made
        finally:
            made.process.kill()
            made.process.wait()
            for module in ("gateway.app", "gateway.controller"):
                while part := made.part(module):
                    part.kill()
                    part.wait(10)


@pytest.mark.invariant(10)
async def test_the_next_gateway_answers_while_the_old_one_streams_and_nobody_is_refused(server: Server) -> None:
    await server.ready()
    old = server.part("gateway.app")
    assert old is not None
    body = {"model": server.world.base.name, "messages": [{"role": "user", "content": LONG}], "stream": True}
    errors: list[str] = []

    def look() -> bool:
        """A new connection each time."""
        try:
            return httpx.get(f"{server.world.settings.url}/readyz", timeout=60, trust_env=False).status_code == 200
        except httpx.TransportError as error:
            errors.append(repr(error))
            return False

    async with (
        httpx.AsyncClient(base_url=server.world.settings.url, timeout=60, trust_env=False) as streaming,
        httpx.AsyncClient(base_url=server.world.settings.url, timeout=60, trust_env=False) as pooled,
        streaming.stream("POST", "/v1/chat/completions", json=body) as stream,
    ):
        parts = stream.aiter_raw()
        await anext(parts)
        assert (await pooled.get("/healthz")).status_code == 200
        server.process.kill()
        server.process.wait()
        await server.until(lambda: not is_ready(server), "the old one drains")
        server.start()
        await server.until(look, "the next one answers")

        chat = await asyncio.to_thread(server.chat, server.world.base.name)
        kept = await pooled.get("/readyz")
        assert old.is_running()
        assert b"data: " in await anext(parts)  # the old one streams on
    await server.until(lambda: not old.is_running(), "the old one ends with its last stream")

    assert errors == []
    assert (chat.status_code, kept.status_code) == (200, 200)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert server.leftovers() == []


def is_ready(server: Server) -> bool:
    return httpx.get(f"{server.world.settings.url}/readyz", timeout=60, trust_env=False).status_code == 200


# ---- Piece by piece


async def test_who_waits_in_the_queue_is_answered_by_the_next(settings: Settings, listening: socket.socket) -> None:
    given: list[bool] = []
    offer = Offer(handover_path(settings), listening, given=lambda: given.append(True))
    with socket.create_connection(("127.0.0.1", settings.port)) as waiting, await takes(settings) as taken:
        offer.close()
        listening.close()

        accepted, address = await asyncio.to_thread(taken.accept)
        assert address == waiting.getsockname()
        accepted.close()
    assert given == [True]
    assert not handover_path(settings).exists()


async def test_it_is_given_again_to_the_one_after_one_that_died(settings: Settings, listening: socket.socket) -> None:
    given: list[bool] = []
    offer = Offer(handover_path(settings), listening, given=lambda: given.append(True))

    for _ in range(3):
        (await takes(settings)).close()

    assert given == [True] * 3
    offer.close()


async def test_until_it_is_taken_the_old_one_keeps_it(settings: Settings, listening: socket.socket) -> None:
    given: list[bool] = []
    offer = Offer(handover_path(settings), listening, given=lambda: given.append(True))

    place = await asyncio.to_thread(Place, settings)
    place.close()
    await asyncio.sleep(0)

    assert given == []
    offer.close()


async def test_when_the_old_one_ends_first_the_address_is_bound_anew(
    settings: Settings, listening: socket.socket
) -> None:
    offer = Offer(handover_path(settings), listening, given=lambda: None)
    place = await asyncio.to_thread(Place, settings)

    listening.close()
    offer.close()

    with await asyncio.to_thread(place.take) as bound:
        assert bound.getsockname()[1] == settings.port


@pytest.mark.parametrize(("listens", "wants"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")])
async def test_a_socket_of_another_address_is_not_taken(tmp_path: Path, listens: str, wants: str) -> None:
    port = free_port()
    old = load_settings(home=tmp_path, port=port, host=listens, auth="keys")
    old.prepare_directories()
    with listening_socket(old) as listening:
        listening.listen()
        offer = Offer(handover_path(old), listening, given=lambda: None)
        with pytest.raises(Invalid, match="TURNOUT_PORT"):
            await takes(old.model_copy(update={"host": wants}))
        offer.close()


async def test_without_an_offer_a_taken_address_is_told_as_before(settings: Settings, listening: socket.socket) -> None:
    for is_left in (False, True):
        if is_left:
            handover_path(settings).touch()
        with pytest.raises(Invalid, match="TURNOUT_PORT") as caught:
            Place(settings)
        assert caught.value.code == "address_in_use"


async def test_an_offer_takes_the_place_of_one_that_a_killed_gateway_left_and_lets_its_follower_be(
    settings: Settings, listening: socket.socket
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(handover_path(settings)))
    first = Offer(handover_path(settings), listening, given=lambda: None)
    second = Offer(handover_path(settings), listening, given=lambda: None)

    first.close()
    (await takes(settings)).close()

    second.close()
    assert not handover_path(settings).exists()


async def test_handed_over_idle_connections_close_and_one_that_is_new_gets_its_answer(tmp_path: Path) -> None:
    async with Stack(tmp_path) as stack:
        port = int(stack.url.rpartition(":")[2])
        idle, fresh = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        idle[1].write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await idle[0].readuntil(b"}")).startswith(b"HTTP/1.1 200")
        connected: Callable[[], bool] = lambda: len(stack.server.server_state.connections) == 2  # noqa: E731
        await until(connected)

        stack.server._hand_over()
        fresh[1].write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = await asyncio.wait_for(fresh[0].read(), 10)

        assert await asyncio.wait_for(idle[0].read(), 10) == b""
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.lower()
        for _, writer in (idle, fresh):
            writer.close()
