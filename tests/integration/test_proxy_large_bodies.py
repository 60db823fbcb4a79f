"""Large bodies are read by a process of their own: with the same outcome, whatever becomes of that process."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from gateway.errors import GatewayError, Unavailable
from gateway.processes import look_at
from gateway.proxy.bodies import LARGE_BODY_BYTES, MAX_STRUCTURE
from gateway.proxy.checks import Bounds
from gateway.proxy.fields import Asked, RebuiltRequest, rebuild
from gateway.proxy.large_bodies import LargeBodies
from tests.fakes.stack import BASE, Stack, chat_body, until

LONG = "a word and another, " * 20_000
CHAT = Asked("chat", Bounds(vocab_size=1_000, max_model_len=4_096), is_evaluator=False)
COMPLETION = Asked("completions", CHAT.bounds, is_evaluator=True, sticky="header")
MOST = 8 * 2**20


@pytest.fixture
async def reader() -> AsyncIterator[LargeBodies]:
    made = LargeBodies(max_body_bytes=MOST)
    yield made
    await made.stop()


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        yield running


def in_parts(content: bytes) -> list[bytes]:
    return [content[start : start + 2**16] for start in range(0, len(content), 2**16)]


def body(**fields: Any) -> bytes:
    return orjson.dumps({**chat_body(LONG), **fields})


def is_gone(pid: int) -> bool:
    seen = look_at(pid)
    return seen is None or seen.is_zombie


# ---- The same outcome

BODIES: list[tuple[Asked, bytes]] = [
    (CHAT, body()),
    (CHAT, body(stream=True, stream_options={"include_usage": True}, user="u", temperature=0.5, stop=["a", "b"], seed=2**62)),
    (CHAT, body(model="é\n\"'")),
    (CHAT, body(messages=[{"role": "user", "content": "\U0001f600 " + LONG}])),
    (CHAT, body(logit_bias={"5": 1})),
    (COMPLETION, orjson.dumps({"model": "m", "prompt": [list(range(1_000))] * 64, "logprobs": 1, "logprob_token_ids": [5]})),
    (COMPLETION, orjson.dumps({"model": "m", "prompt": LONG, "user": "not the header"})),
    (CHAT, b"{" + b" " * 300_000),
    (CHAT, b'{"model": "\\ud800"}'),
    (CHAT, b"[]"),
    (CHAT, body(messages=[])),
    (CHAT, body(stop=[{}] * 40_000)),
    (CHAT, body(messages=[{"role": "user", "content": ""}] * 30_000)),
    (CHAT, body(colour=[LONG])),
    (CHAT, body(model="m" * 300_000)),
    (CHAT, orjson.dumps({"model": "m", "prompt": LONG})),
    (CHAT, body(logprob_token_ids=[1])),
    (CHAT, body(stream_options={"x" * 300_000: 1}, stream=True)),
]  # fmt: skip


def outcome(made: RebuiltRequest | GatewayError) -> Any:
    if isinstance(made, GatewayError):
        return type(made), made.message, made.code, made.param
    return made


async def test_it_makes_no_difference_who_reads_a_body(reader: LargeBodies) -> None:
    for asked, content in BODIES:
        here: RebuiltRequest | GatewayError
        there: RebuiltRequest | GatewayError
        try:
            here = rebuild(content, asked)
        except GatewayError as error:
            here = error
        try:
            there = await reader.rebuild(asked, in_parts(content))
        except GatewayError as error:
            there = error

        assert outcome(there) == outcome(here)


async def test_a_large_completion_reaches_the_engine_as_it_was_sent(stack: Stack) -> None:
    async with stack.client("inference") as client:
        whole = await client.post("/v1/chat/completions", json=chat_body(LONG, max_tokens=5))
        streamed = await client.post("/v1/chat/completions", json=chat_body(LONG, stream=True))
        small = await client.post("/v1/chat/completions", json=chat_body("hello", max_tokens=5))

    assert [answer.status_code for answer in (whole, streamed, small)] == [200, 200, 200]
    assert streamed.content.endswith(b"data: [DONE]\n\n")
    first, _, last = stack.engine.asked
    assert first.body["messages"] == [{"role": "user", "content": LONG}]
    assert first.body.keys() == last.body.keys()
    assert (first.body["model"], first.body["cache_salt"], first.body["max_tokens"]) == (
        last.body["model"],
        last.body["cache_salt"],
        5,
    )
    assert stack.gateway.large_bodies.pid is not None


async def test_a_large_body_without_a_length_is_read_as_well(stack: Stack) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for part in in_parts(body()):
            yield part

    async with stack.client("inference") as client:
        answer = await client.post("/v1/chat/completions", content=parts())

    assert answer.status_code == 200
    assert stack.engine.asked[0].body["messages"][0]["content"] == LONG


async def test_small_bodies_start_no_process(stack: Stack) -> None:
    async with stack.client("inference") as client:
        assert (
            await client.post("/v1/chat/completions", json=chat_body("x" * (LARGE_BODY_BYTES - 500)))
        ).status_code == 200

    assert stack.gateway.large_bodies.pid is None


async def test_a_bomb_is_refused_by_its_raw_bytes_and_starts_no_process(stack: Stack) -> None:
    bombs = [b'{"stop":[%s]}' % b",".join([b"[]"] * 2_700_000), b'{"stop":[%s]}' % b",".join([b'{"a":1}'] * 800_000)]
    async with stack.client("inference") as client:
        answers = [await client.post("/v1/chat/completions", content=bomb) for bomb in bombs]

    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many")
        assert f"{MAX_STRUCTURE:,}" in answer.json()["error"]["message"]
    assert stack.gateway.large_bodies.pid is None
    assert stack.gateway.completions.bodies.room.taken_bytes == 0


async def test_many_large_bodies_at_once_are_all_answered(stack: Stack) -> None:
    chosen = [body(user=f"u{number}") if number % 2 else b"[" + b" " * 300_000 for number in range(24)]
    async with stack.client("inference") as client:
        answers = await asyncio.gather(*(client.post("/v1/chat/completions", content=content) for content in chosen))

    assert [answer.status_code for answer in answers] == [400, 200] * 12
    assert stack.gateway.completions.bodies.room.taken_bytes == 0


# ---- Whatever becomes of the process


def is_writing(reader: LargeBodies) -> bool:
    """Whether part of a body waits for the process to read it."""
    return reader._running is not None and reader._running.writer.transport.get_write_buffer_size() > 0


async def test_a_process_that_died_is_started_again(reader: LargeBodies) -> None:
    await reader.rebuild(CHAT, in_parts(body()))
    first = reader.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: is_gone(first))

    assert (await reader.rebuild(CHAT, in_parts(body()))).model == BASE
    assert reader.pid != first


async def test_a_process_that_dies_on_a_body_is_a_503_and_the_next_body_is_read(reader: LargeBodies) -> None:
    await reader.rebuild(CHAT, in_parts(body()))
    pid = reader.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    asking = asyncio.create_task(reader.rebuild(CHAT, in_parts(body())))
    waiting = asyncio.create_task(reader.rebuild(CHAT, in_parts(body())))
    await until(lambda: is_writing(reader))
    os.kill(pid, signal.SIGKILL)

    with pytest.raises(Unavailable) as caught:
        await asking

    assert caught.value.code == "large_body_unread"
    assert (await waiting).model == BASE


async def test_a_process_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = LargeBodies(max_body_bytes=MOST, read_timeout_s=5)
    await reader.rebuild(CHAT, in_parts(body()))
    pid = reader.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(reader, "_read_timeout_s", 0.05)

    with pytest.raises(Unavailable):
        await reader.rebuild(CHAT, in_parts(body()))

    assert is_gone(pid)
    assert reader.pid is None
    await reader.stop()


async def test_who_goes_in_the_middle_mixes_up_no_answers(reader: LargeBodies) -> None:
    chooser = random.Random(5)
    kept: list[tuple[str, asyncio.Task[RebuiltRequest]]] = []
    for number in range(40):
        asking = asyncio.create_task(reader.rebuild(CHAT, in_parts(body(model=f"m{number}"))))
        for _ in range(chooser.randrange(12)):
            await asyncio.sleep(0)
        if number % 2:
            asking.cancel()
        else:
            kept.append((f"m{number}", asking))

    assert [(await asking).model for _, asking in kept] == [model for model, _ in kept]


async def test_a_program_that_cannot_start_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    reader = LargeBodies(max_body_bytes=MOST)

    with pytest.raises(Unavailable):
        await reader.rebuild(CHAT, in_parts(body()))

    await reader.stop()


async def test_a_body_that_takes_more_memory_than_there_is_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = LargeBodies(max_body_bytes=MOST)
    monkeypatch.setattr(reader, "_memory_bytes", 96 * 2**20)

    with pytest.raises(Unavailable):
        await reader.rebuild(CHAT, [b" " * 2**20] * 128)

    assert (await reader.rebuild(CHAT, in_parts(body()))).model == BASE
    await reader.stop()


async def test_a_stop_leaves_no_process_and_starts_none(reader: LargeBodies) -> None:
    await reader.rebuild(CHAT, in_parts(body()))
    pid = reader.pid
    assert pid is not None

    await reader.stop()

    assert is_gone(pid)
    with pytest.raises(Unavailable):
        await reader.rebuild(CHAT, in_parts(body()))
    assert reader.pid is None


async def test_a_stop_in_the_middle_of_a_body_ends_it(reader: LargeBodies) -> None:
    await reader.rebuild(CHAT, in_parts(body()))
    pid = reader.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    asking = asyncio.create_task(reader.rebuild(CHAT, in_parts(body())))
    await asyncio.sleep(0)

    await reader.stop()

    assert is_gone(pid)
    with pytest.raises((Unavailable, asyncio.CancelledError)):
        await asking


async def test_the_process_has_no_secret_and_no_file(reader: LargeBodies, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNOUT_DATABASE_URL", "postgresql://secret")
    await reader.rebuild(CHAT, in_parts(body()))
    pid = reader.pid
    assert pid is not None

    environment = Path(f"/proc/{pid}/environ").read_bytes()
    opened = [str(found.readlink()) for found in Path(f"/proc/{pid}/fd").iterdir()]

    assert b"secret" not in environment
    assert {entry.partition(b"=")[0] for entry in environment.split(b"\0") if entry} == {
        b"PYTHONPATH",
        b"MALLOC_MMAP_THRESHOLD_",
        b"MALLOC_ARENA_MAX",
    }
    assert sum(target.startswith("socket:") for target in opened) == 1
    assert [target for target in opened if target.endswith((".db", ".sock"))] == []


async def test_signals_of_a_terminal_leave_it_to_its_gateway(reader: LargeBodies) -> None:
    await reader.rebuild(CHAT, in_parts(body()))
    pid = reader.pid
    assert pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)

    assert (await reader.rebuild(CHAT, in_parts(body()))).model == BASE
    assert reader.pid == pid


async def test_it_stays_small(reader: LargeBodies) -> None:
    await reader.rebuild(CHAT, in_parts(body()))
    process = psutil.Process(reader.pid)
    before = process.memory_info().rss
    for asked, content in BODIES * 3:
        with_errors = await asyncio.gather(reader.rebuild(asked, in_parts(content)), return_exceptions=True)
        assert len(with_errors) == 1

    assert before < 48 * 2**20
    assert process.memory_info().rss - before < 32 * 2**20
