"""Bodies of completions are bounded by counts before their elements are looked at, and by a room before they are read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from gateway.errors import GatewayError, Invalid, TooLarge, Unavailable
from gateway.proxy import checks
from gateway.proxy.asgi import Message, Receive
from gateway.proxy.bodies import LARGE_BODY_BYTES, MAX_STRUCTURE, Incoming, Room
from gateway.proxy.checks import Bounds
from gateway.proxy.fields import MAX_FIELDS, MAX_MODEL_CHARS, Asked, Endpoint, read_request, rebuild

BOUNDS = Bounds(vocab_size=100, max_model_len=64)
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}
MOST = 8 * 2**20


class Unseen(list[Any]):
    """Items that nobody may look at, but for as many as an error shows."""

    def __iter__(self) -> Iterator[Any]:
        for place, item in enumerate(super().__iter__()):
            assert place < 200, "looked at far into what should have been counted only"
            yield item


class UnseenFields(dict[str, Any]):
    """The same of an object."""

    def items(self) -> Any:
        return Unseen(super().items())

    def values(self) -> Any:
        return Unseen(super().values())


def refusal(body: Any, *, endpoint: Endpoint = "chat") -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        read_request(endpoint, body, BOUNDS, is_evaluator=True)
    return caught.value


# ---- Counts before elements


@pytest.mark.parametrize(
    ("endpoint", "field", "value"),
    [
        ("chat", "messages", Unseen([{}] * (checks.MAX_MESSAGES + 1))),
        ("chat", "messages", [{"role": "user", "content": Unseen([{}] * (checks.MAX_PARTS + 1))}]),
        ("chat", "messages", [UnseenFields({f"f{number}": None for number in range(1_000)})]),
        ("chat", "stop", Unseen([{}] * 10_000)),
        ("chat", "logit_bias", UnseenFields.fromkeys(map(str, range(1_000)), 1)),
        ("chat", "metadata", UnseenFields.fromkeys(map(str, range(1_000)), "x")),
        ("completions", "prompt", Unseen(["x"] * (checks.MAX_PROMPTS + 1))),
        ("completions", "prompt", Unseen([1] * 300)),
        ("completions", "prompt", [Unseen([1] * 300)]),
        ("completions", "logprob_token_ids", Unseen([1] * 300)),
    ],
)
def test_elements_are_counted_before_they_are_looked_at(endpoint: Endpoint, field: str, value: Any) -> None:
    body = {**(CHAT if endpoint == "chat" else COMPLETION), "logprobs": endpoint == "chat" or 1, field: value}

    error = refusal(body, endpoint=endpoint)

    assert (error.param or "").startswith(field)
    assert error.code in {"too_many", "invalid_value"}


def test_a_body_of_too_many_fields_is_refused_by_their_number() -> None:
    error = refusal(UnseenFields.fromkeys(map(str, range(MAX_FIELDS + 1))))

    assert error.code == "too_many"
    assert f"{MAX_FIELDS + 1} fields" in error.message


@pytest.mark.parametrize("count", [checks.MAX_MESSAGES, 1])
def test_as_many_messages_as_may_be_pass(count: int) -> None:
    request = read_request("chat", {**CHAT, "messages": CHAT["messages"] * count}, BOUNDS, is_evaluator=False)

    assert len(request.forwarded["messages"]) == count


@pytest.mark.parametrize("role", [[], {}, [[]], 5, None, True])
def test_a_role_that_is_no_text_is_refused_by_its_place(role: Any) -> None:
    assert refusal({**CHAT, "messages": [{"role": role, "content": "x"}]}).param == "messages[0].role"


def test_a_model_longer_than_any_name_is_unknown_and_not_quoted_whole() -> None:
    error = refusal({**CHAT, "model": "m" * (MAX_MODEL_CHARS + 1)})

    assert error.code == "model_not_found"
    assert len(error.message) < 400


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff", b'{"model": NaN}', b'{"seed": 1e999}', b'{"seed": %s}' % (b"9" * 4_000), b'{"user": "\\ud800"}', b"\xef\xbb\xbf{}",
        b"[" * 5_000 + b"]" * 5_000, b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    ],
)  # fmt: skip
def test_what_is_no_json_is_refused_in_a_few_words(content: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        rebuild(content, Asked("chat", BOUNDS, is_evaluator=False))

    assert caught.value.code == "invalid_json"
    assert len(caught.value.message) <= 200


# ---- Raw bytes


def coming(parts: Iterable[bytes]) -> tuple[Receive, list[int]]:
    """A body in parts, and the sizes of those that were asked for."""
    waiting = iter([*parts, None])
    asked: list[int] = []

    async def receive() -> Message:
        part = next(waiting)
        asked.append(len(part or b""))
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    return receive, asked


async def taken(parts: Iterable[bytes], *, max_bytes: int = MOST) -> tuple[Incoming, list[int]]:
    receive, asked = coming(parts)
    incoming = Incoming(max_bytes)
    await take_all(incoming, receive)
    return incoming, asked


async def take_all(incoming: Incoming, receive: Receive) -> None:
    while not incoming.is_whole:
        await incoming.take(receive)


@pytest.mark.parametrize("character", [b",", b"[", b"{", b":"])
async def test_a_large_body_with_too_much_structure_is_refused_before_the_rest_is_read(character: bytes) -> None:
    receive, asked = coming([character * 2**16] * 128)
    incoming = Incoming(MOST)

    with pytest.raises(Invalid) as caught:
        await take_all(incoming, receive)

    assert caught.value.code == "too_many"
    assert f"{MAX_STRUCTURE:,}" in caught.value.message
    assert sum(asked) <= LARGE_BODY_BYTES + 2**16


async def test_structure_counts_from_the_first_byte_of_a_large_body() -> None:
    with pytest.raises(Invalid):
        await taken([b"," * LARGE_BODY_BYTES, b"x"])


async def test_a_body_that_is_not_large_may_hold_what_fits() -> None:
    incoming, _ = await taken([b"," * LARGE_BODY_BYTES])

    assert not incoming.is_large


async def test_a_large_body_of_text_is_taken_whole() -> None:
    text = b"Well, this [text] has: some structure {in it} as prose does. " * 1_000

    incoming, _ = await taken([text] * 8)

    assert incoming.is_large
    assert b"".join(incoming.parts) == text * 8


async def test_a_body_that_comes_byte_by_byte_is_kept_in_large_pieces() -> None:
    incoming, asked = await taken([b"x"] * 200_000 + [b","] * 200_000)

    assert len(asked) == 400_001
    assert len(incoming.parts) <= 8
    assert (incoming.size, incoming.structure) == (400_000, 200_000)


async def test_a_body_over_the_cap_is_refused_before_the_rest_is_read() -> None:
    receive, asked = coming([b"x" * 100] * 100)
    incoming = Incoming(1_000)

    with pytest.raises(TooLarge):
        await take_all(incoming, receive)

    assert sum(asked) == 1_100


# ---- Room


class Holder:
    """Somebody with a large body."""

    def __init__(self, room: Room, key: str, size: int) -> None:
        self.is_in = False
        self._may_go = asyncio.Event()
        self.task = asyncio.create_task(self._hold(room, key, size))

    async def _hold(self, room: Room, key: str, size: int) -> None:
        async with room.hold(key, size):
            self.is_in = True
            await self._may_go.wait()
        self.is_in = False

    async def leave(self) -> None:
        self._may_go.set()
        await self.task


async def holders(room: Room, *asked: tuple[str, int]) -> list[Holder]:
    made = [Holder(room, key, size) for key, size in asked]
    await settled()
    return made


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_no_more_is_held_than_there_is_room_for() -> None:
    room = Room(100)

    made = await holders(room, ("a", 40), ("b", 40), ("c", 40), ("d", 10))

    # Who came later does not go first, even where it would fit.
    assert [one.is_in for one in made] == [True, True, False, False]
    await made[0].leave()
    await settled()
    assert [one.is_in for one in made] == [False, True, True, True]
    assert room.taken_bytes == 90
    for one in made[1:]:
        await one.leave()
    assert (room.taken_bytes, room.waiting) == (0, 0)


async def test_one_key_gets_half_and_holds_nobody_else_up() -> None:
    room = Room(100)

    made = await holders(room, ("a", 30), ("a", 20), ("a", 10), ("b", 50))

    assert [one.is_in for one in made] == [True, True, False, True]
    for one in made:
        await one.leave()


async def test_a_body_larger_than_the_room_is_read_alone() -> None:
    room = Room(100)

    made = await holders(room, ("a", 500), ("b", 1))

    assert [one.is_in for one in made] == [True, False]
    for one in made:
        await one.leave()


async def test_who_waits_too_long_is_told_to_come_back() -> None:
    room = Room(100, wait_s=0.01)
    (first,) = await holders(room, ("a", 100))

    with pytest.raises(Unavailable) as caught:
        async with room.hold("b", 100):
            pass

    assert caught.value.code == "large_bodies_busy"
    await first.leave()
    assert (room.taken_bytes, room.waiting) == (0, 0)


async def test_one_key_cannot_fill_the_queue() -> None:
    room = Room(100)
    crowd = await holders(room, ("b", 100), *[("a", 10)] * 200)
    turned_away = [one for one in crowd if one.task.done() and isinstance(one.task.exception(), Unavailable)]

    (late,) = await holders(room, ("c", 10))

    assert len(turned_away) == 200 - 64
    assert not late.task.done()
    for one in [*crowd, late]:  # all at once: none of them may be let in any more
        one.task.cancel()
    ends = await asyncio.gather(*(one.task for one in [*crowd, late]), return_exceptions=True)
    assert {type(end) for end in ends} == {Unavailable, asyncio.CancelledError}
    assert (room.taken_bytes, room.waiting) == (0, 0)


async def test_who_goes_while_waiting_leaves_no_gap() -> None:
    room = Room(100)
    made = await holders(room, ("a", 100), ("b", 100), ("c", 100))

    made[1].task.cancel()
    await made[0].leave()
    await settled()

    assert [one.is_in for one in made] == [False, False, True]
    await made[2].leave()
    assert room.taken_bytes == 0


async def test_who_goes_in_the_moment_of_its_turn_gives_it_back() -> None:
    room = Room(100)
    made = await holders(room, ("a", 100), ("b", 100))

    made[0]._may_go.set()
    await asyncio.sleep(0)  # the room is given to the second, which has not run yet
    made[1].task.cancel()
    await settled()

    assert (room.taken_bytes, room.waiting) == (0, 0)
