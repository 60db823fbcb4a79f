"""Clients without a key that hold connections, in a process with a file limit of its own.

`python -m tests.fakes.strangers PORT KIND` makes connections and never stops: what the server closes is opened again.
It writes `ready` once it has made as many as it should hold, and ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_HEAD = b"POST /v1/files HTTP/1.1\r\nhost: x\r\n"
_HEALTH = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
# What is sent at first, and what again and again.
SAID: dict[str, tuple[bytes, bytes]] = {
    "silent": (b"", b""),
    "slow head": (_HEAD, b"x: y\r\n"),
    "no key, then idle": (b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", b""),
    "a wrong key, then idle": (b"GET /v1/models HTTP/1.1\r\nhost: x\r\nauthorization: Bearer tn-wrong\r\n\r\n", b""),
    "health, again and again": (_HEALTH, _HEALTH),
    "slow body": (_HEAD + b"content-length: 1000000\r\n\r\n", b"x"),
    "malformed, then not closed": (b"GET /healthz HTTP/0.9\r\n\r\n", b""),
    "never reads": (_HEALTH * 2000, b""),
}
_PAUSE_S = 0.5


async def hold(port: int, kind: str, count: int, sources: list[str]) -> None:
    """Hold `count` connections for ever."""
    made = asyncio.Event()
    numbers = itertools.count(1)

    async def one(source: str) -> None:
        while True:
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
                if next(numbers) == count:
                    made.set()
                with contextlib.closing(writer):
                    await _say(kind, reader, writer)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for number in range(count):
            tasks.create_task(one(sources[number % len(sources)]))
        await made.wait()
        sys.stdout.write("ready\n")
        sys.stdout.flush()


async def _say(kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    first, again = SAID[kind]
    writer.write(first)
    if kind == "never reads":
        await writer.wait_closed()
    while True:
        with contextlib.suppress(TimeoutError):
            if not await asyncio.wait_for(reader.read(2**16), _PAUSE_S):
                return
        writer.write(again)


async def _until_stdin_ends() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("kind", choices=SAID)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--source", action="append", help="address that they come from")
    arguments = parser.parse_args()
    held = asyncio.create_task(hold(arguments.port, arguments.kind, arguments.count, arguments.source or ["127.0.0.1"]))
    await asyncio.wait([held, asyncio.create_task(_until_stdin_ends())], return_when=asyncio.FIRST_COMPLETED)


@asynccontextmanager
async def strangers(port: int, kind: str, *, count: int = 400, sources: list[str] | None = None) -> AsyncIterator[None]:
    """The process, once every connection was made."""
    chosen = [word for source in sources or [] for word in ("--source", source)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fakes.strangers", str(port), kind, "--count", str(count), *chosen,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.kill()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(_main())
