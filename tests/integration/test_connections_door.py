"""A small room: 16 connections, of which 8 may be strangers and 14 known."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.connections import door as doors
from gateway.connections.connection import Connection
from gateway.connections.door import Door
from gateway.connections.room import Cut, size_of
from gateway.metrics import Metrics
from tests.fakes.stack import Stack, chat_body, until
from tests.framing.wire import Answer, Wire

KNOWN = 14
STRANGERS = 8


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path, limits={"connections": 16}) as running:
        yield running


@pytest.fixture
async def wires() -> AsyncIterator[list[Wire]]:
    made: list[Wire] = []
    yield made
    for wire in made:
        wire.close()


async def connected(stack: Stack, wires: list[Wire], count: int) -> list[Wire]:
    """So many more connections."""
    found = [await Wire.to(int(stack.url.rpartition(":")[2])) for _ in range(count)]
    wires += found
    return found


def request(stack: Stack, text: str = "hello", **fields: Any) -> bytes:
    body = json.dumps(chat_body(text, **fields)).encode()
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {stack.keys['inference']}\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


async def asked(wire: Wire, stack: Stack) -> Answer | None:
    await wire.send(request(stack))
    return await wire.answer()


async def known(stack: Stack, wires: list[Wire], count: int) -> list[Wire]:
    """Connections that were answered and are idle; the first has been so for longest."""
    found = []
    for _ in range(count):
        found += await connected(stack, wires, 1)
        answer = await asked(found[-1], stack)
        assert answer is not None
        assert answer.status == 200
    return found


async def streaming(stack: Stack, wires: list[Wire], count: int) -> list[Wire]:
    """Connections that are being answered, for long."""
    found = []
    for _ in range(count):
        found += await connected(stack, wires, 1)
        others = stack.engine.running
        await found[-1].send(request(stack, "fake:chunks=10000 fake:delay_ms=20", stream=True))
        await until(lambda others=others: stack.engine.running > others)  # type: ignore[misc]
    return found


def counted(stack: Stack, name: str, **labels: str) -> float:
    return stack.gateway.metrics.registry.get_sample_value(name, labels) or 0.0


# ---- Strangers


async def test_the_stranger_that_came_first_goes_for_the_newcomer(stack: Stack, wires: list[Wire]) -> None:
    first, second, *_ = await connected(stack, wires, STRANGERS)
    await until(lambda: counted(stack, "turnout_connections", kind="stranger") == STRANGERS)

    [new] = await known(stack, wires, 1)

    assert await first.rest() == b""
    assert not second.has_ended
    assert not new.has_ended
    assert counted(stack, "turnout_connections_cut_total", reason="strangers") == 1


async def test_an_address_with_its_share_makes_room_for_itself(tmp_path: Path, wires: list[Wire]) -> None:
    async with Stack(tmp_path, limits={"connections": 16, "connections_per_address": 2}) as stack:
        first, second = await connected(stack, wires, 2)
        await known(stack, wires, 1)

        assert await first.rest() == b""
        assert not second.has_ended
        assert counted(stack, "turnout_connections_cut_total", reason="address") == 1


async def test_all_is_counted_and_forgotten(stack: Stack, wires: list[Wire]) -> None:
    await known(stack, wires, 3)
    await connected(stack, wires, 2)
    await until(lambda: counted(stack, "turnout_connections", kind="stranger") == 2)
    before = counted(stack, "turnout_connections", kind="known")

    for wire in wires:
        wire.close()

    await until(lambda: counted(stack, "turnout_connections", kind="stranger") == 0)
    await until(lambda: counted(stack, "turnout_connections", kind="known") == 0)
    assert (before, counted(stack, "turnout_connections_limit")) == (3, 16)
    assert stack.server._door._open_files == 0


# ---- Known ones


async def test_when_known_ones_fill_their_room_the_one_goes_that_has_been_idle_for_longest(
    stack: Stack, wires: list[Wire]
) -> None:
    first, second, *others = await known(stack, wires, KNOWN)
    await asked(first, stack)  # now it is the youngest

    [new] = await known(stack, wires, 1)

    assert await second.rest() == b""
    assert [wire.has_ended for wire in (first, *others, new)] == [False] * KNOWN
    assert counted(stack, "turnout_connections_cut_total", reason="idle") == 1


async def test_one_that_is_being_answered_never_goes_and_the_next_key_is_told_to_come_back(
    stack: Stack, wires: list[Wire]
) -> None:
    streams = await streaming(stack, wires, KNOWN)
    [late] = await connected(stack, wires, 1)
    answer = await asked(late, stack)

    assert answer is not None
    assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "too_many_connections")
    assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
    assert await late.rest() == b""
    assert stack.engine.running == KNOWN
    assert counted(stack, "turnout_connections_cut_total", reason="full") == 1

    streams[0].close()
    await until(lambda: counted(stack, "turnout_connections", kind="known") == KNOWN - 1)
    await known(stack, wires, 1)


async def test_strangers_displace_no_known_one(stack: Stack, wires: list[Wire]) -> None:
    kept = await known(stack, wires, KNOWN)

    for _ in range(10):
        await connected(stack, wires, 1)
    await until(lambda: counted(stack, "turnout_connections_cut_total", reason="strangers") == 8)

    answers = [await asked(wire, stack) for wire in kept]
    assert [answer and answer.status for answer in answers] == [200] * KNOWN


async def test_without_keys_the_first_answer_makes_a_connection_known(tmp_path: Path, wires: list[Wire]) -> None:
    async with Stack(tmp_path, auth="none") as stack:
        [wire] = await connected(stack, wires, 1)
        await wire.send(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await wire.answer()

        assert counted(stack, "turnout_connections", kind="known") == 1


# ---- The socket itself


class Listening(socket.socket):
    """Where somebody waits, and accepting fails."""

    error = errno.EMFILE
    accepts = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.accepts += 1
        raise OSError(self.error, "accept")


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
async def test_without_files_accepting_waits_and_does_not_spin(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "_PAUSE_S", 1000.0)
    door = Door(size_of(16, 16), Metrics())
    with Listening() as listening:
        listening.error = error
        listening.bind(("127.0.0.1", 0))
        door.open([listening], lambda: pytest.fail("nobody came in"), backlog=8)
        with socket.create_connection(listening.getsockname()):
            await until(lambda: listening.accepts > 0)
            for _ in range(20):
                await asyncio.sleep(0)
            accepts = listening.accepts
            door._resume()
            await until(lambda: listening.accepts > accepts)
        door.close()

    assert (accepts, listening.accepts) == (1, 2)


async def test_after_it_is_closed_nobody_comes_in(stack: Stack, wires: list[Wire]) -> None:
    stack.server._door.close()

    [wire] = await connected(stack, wires, 1)  # the kernel's queue still takes it
    stack.server._door._resume()
    await stack.stop()

    assert await wire.rest() == b""
    assert stack.server._door._open_files == 0


async def test_who_is_cut_before_it_was_made_ends_when_it_is_made(
    stack: Stack, wires: list[Wire], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack.server._door._room, "enter", _cuts_the_newcomer)

    [wire] = await connected(stack, wires, 1)

    assert await wire.rest() == b""
    await until(lambda: stack.server._door._open_files == 0)


def _cuts_the_newcomer(guest: Connection, address: str) -> Cut[Connection]:
    return Cut(guest, "strangers")


async def test_a_known_one_that_gives_way_reads_its_last_answer_and_has_so_long(
    tmp_path: Path, wires: list[Wire]
) -> None:
    async with Stack(tmp_path, limits={"connections": 16}) as stack:
        [slow] = await connected(stack, wires, 1)
        asking = f"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {stack.keys['inference']}\r\n\r\n"
        await slow.send(asking.encode())
        assert await slow.answer() is not None
        connection: Any = next(iter(stack.server.server_state.connections))
        connection.transport.write(b"x" * 2**24)  # more than the kernel takes

        connection.give_way()
        is_closed_at_once = connection._is_lost
        stack.server._close_stragglers()

        await until(lambda: connection._is_lost)
        assert not is_closed_at_once
