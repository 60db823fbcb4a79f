"""Engines that answer oddly or wrongly, through the whole gateway: nobody gets a byte of another's answer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.fakes.engine_framings import FRAMINGS, Framing
from tests.fakes.raw_engine import FOREIGN, RawEngine
from tests.fakes.stack import Stack, chat_body, events_of, until

MINE = "première"
NEXT = "seconde"


@dataclass(frozen=True)
class World:
    """A gateway, and an engine that does as it is told."""

    stack: Stack
    engine: RawEngine
    client: httpx.AsyncClient

    async def ask(self, text: str, *, is_stream: bool = False) -> httpx.Response:
        """Ask, and wait until the gateway has done with the answer too."""
        response = await self.client.post("/v1/chat/completions", json=chat_body(text, stream=is_stream))
        await until(lambda: self.stack.gateway.lifecycle.in_flight == 0)
        return response


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory(prefix="turnout-test-") as folder:
        async with RawEngine(Path(folder) / "raw.sock") as engine, Stack(tmp_path_factory.mktemp("stack")) as stack:
            await stack.set_replica("replica-1", socket=str(engine.socket), epoch="2")
            async with stack.client("inference") as client:
                yield World(stack, engine, client)


def said(response: httpx.Response) -> str:
    """What an answer says; it must be whole."""
    assert response.status_code == 200, response.text
    if "text/event-stream" not in response.headers["content-type"]:
        return str(response.json()["choices"][0]["message"]["content"])
    events = events_of(response.content)
    assert events[-1] == b"[DONE]"
    assert b"".join(b"data: %s\n\n" % event for event in events) == response.content
    chunks = [json.loads(event) for event in events[:-1]]
    return "".join(choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"])


def failure(response: httpx.Response) -> str:
    """The code of an honest error: by the status, or as the last event of a stream that had begun."""
    assert b"[DONE]" not in response.content
    if response.status_code == 200:
        return str(json.loads(events_of(response.content)[-1])["error"]["code"])
    assert response.status_code == 502, response.text
    return str(response.json()["error"]["code"])


@pytest.mark.parametrize("piece_bytes", [None, 1, 7], ids=["whole", "bytewise", "by sevens"])
@pytest.mark.parametrize(
    "framing", FRAMINGS, ids=lambda framing: f"{'stream' if framing.is_stream else 'whole'}: {framing.name}"
)
@pytest.mark.asyncio(loop_scope="module")
async def test_an_odd_answer_is_understood_or_refused_and_the_next_client_gets_its_own(
    world: World, framing: Framing, piece_bytes: int | None
) -> None:
    engine = world.engine
    engine.play(framing.script, closes=framing.closes, piece_bytes=piece_bytes)

    mine = await world.ask(MINE, is_stream=framing.is_stream)
    following = await world.ask(NEXT)

    if framing.is_own:
        assert said(mine) == MINE
    else:
        assert failure(mine) in {"bad_engine_answer", "engine_error", "wrong_answer", "wrong_model"}
    assert said(following) == NEXT
    assert not any(secret in mine.text for secret in (FOREIGN, "0x7f", "/usr/lib", "<html>"))
    if framing.is_reused is not None:
        assert (engine.served_on[-1] == engine.served_on[-2]) == framing.is_reused
