"""Bodies of requests that are no completions: how large they may be, and how long they may take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.api.declared import MAX_JSON_BYTES
from gateway.proxy.cutting import Timeouts
from tests.fakes.stack import Stack, until

BODY_TIMEOUT_S = 0.3
NEW_KEY = json.dumps({"name": "slow", "scopes": ["inference"]}).encode()
FORM = {"content-type": "multipart/form-data; boundary=B"}
FILE_HEAD = (
    b'--B\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--B\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
)
WEIGHTS_HEAD = b'--B\r\ncontent-disposition: form-data; name="adapter_model"; filename="a"\r\n\r\n'


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    timeouts = Timeouts(request_s=60, body_s=BODY_TIMEOUT_S)
    async with Stack(tmp_path, timeouts=timeouts) as running:
        yield running


async def pieces(*parts: bytes, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    """A body without a declared length."""
    for part in parts:
        yield part
        await asyncio.sleep(pause_s)


async def stalled(stack: Stack, path: str, sent: bytes, *, content_type: str) -> tuple[int, dict[str, Any]]:
    """The answer to a body of which nothing follows what was sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(stack.url.rpartition(":")[2]))
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {stack.keys['admin']}\r\n"
        f"content-type: {content_type}\r\ncontent-length: {len(sent) + 99}\r\n\r\n"
    )
    writer.write(head.encode() + sent)
    answer = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
    writer.close()
    return int(answer.split()[1]), json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.parametrize("path", ["/api/keys", "/api/evaluations", "/v1/fine_tuning/jobs", "/api/routes/x/promote"])
async def test_a_body_over_the_cap_is_refused_alike_whether_its_length_was_declared(stack: Stack, path: str) -> None:
    json_type = {"content-type": "application/json"}
    async with stack.client("admin") as client:
        declared = await client.post(path, content=b" " * (MAX_JSON_BYTES + 1), headers=json_type)
        counted = await client.post(path, content=pieces(*[b" " * 1000] * 66), headers=json_type)

    assert (counted.status_code, counted.json()) == (declared.status_code, declared.json())
    assert (counted.status_code, counted.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_body_that_fits_is_read_in_pieces_too(stack: Stack) -> None:
    async with stack.client("admin") as client:
        content = pieces(NEW_KEY[:10], NEW_KEY[10:])
        made = await client.post("/api/keys", content=content, headers={"content-type": "application/json"})

    assert made.status_code == 201


@pytest.mark.parametrize("path", ["/api/keys", "/api/evaluations", "/v1/fine_tuning/jobs", "/api/routes/x/promote"])
async def test_a_body_that_does_not_come_is_answered_with_408(stack: Stack, path: str) -> None:
    status, error = await stalled(stack, path, b"{", content_type="application/json")

    assert (status, error["type"], error["code"]) == (408, "timeout_error", "body_timeout")
    await until(lambda: stack.gateway.lifecycle.in_flight == 0)


async def test_a_body_that_drips_is_answered_with_408(stack: Stack) -> None:
    async with stack.client("admin") as client:
        drops = pieces(*[b" "] * 40, NEW_KEY, pause_s=BODY_TIMEOUT_S / 4)
        answer = await client.post("/api/keys", content=drops, headers={"content-type": "application/json"})

    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "body_timeout")


@pytest.mark.parametrize(("path", "head"), [("/v1/files", FILE_HEAD), ("/api/adapters/support/versions", WEIGHTS_HEAD)])
async def test_an_upload_that_stalls_is_answered_with_408_and_leaves_nothing(
    stack: Stack, path: str, head: bytes
) -> None:
    status, error = await stalled(stack, path, head + b"x" * 2_000_000, content_type=FORM["content-type"])

    assert (status, error["code"]) == (408, "body_timeout")
    left = [*stack.settings.files_dir.rglob("*"), *stack.settings.artifacts_dir.rglob("*")]
    assert [path for path in left if path.is_file()] == []


async def test_a_steady_upload_may_take_longer_than_any_part_of_it(stack: Stack) -> None:
    async with stack.client("train") as client:
        parts = [FILE_HEAD, *[b"x" * 100] * 12, b"\r\n--B--\r\n"]
        made = await client.post("/v1/files", content=pieces(*parts, pause_s=BODY_TIMEOUT_S / 4), headers=FORM)

    assert (made.status_code, made.json()["bytes"]) == (200, 1200)
