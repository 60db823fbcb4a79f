"""The process that reads large bodies, as the gateway sees it: started when the first one comes, one question at a time.

It may die, hang or be killed at any moment: then the question ends with a 503, and the next one starts it anew.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from ..errors import Unavailable
from .fields import Asked, RebuiltRequest
from .reading import HEAD, question, read_answer

log = structlog.get_logger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_READ_TIMEOUT_S = 15.0
_BUFFER_BYTES = 2**20
_STOP_TIMEOUT_S = 2.0
# Address space: what the interpreter takes, and several times what the largest body can unfold to.
_MEMORY_BYTES = 512 * 2**20
_BODIES_IN_MEMORY = 8
# Large blocks go back to the kernel as soon as they are free.
_ENVIRONMENT = {"PYTHONPATH": str(_ROOT), "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True, slots=True)
class _Running:
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class LargeBodies:
    """Has large bodies read, checked and rebuilt elsewhere."""

    def __init__(self, *, max_body_bytes: int, read_timeout_s: float = _READ_TIMEOUT_S) -> None:
        self._memory_bytes = _MEMORY_BYTES + _BODIES_IN_MEMORY * max_body_bytes
        self._read_timeout_s = read_timeout_s
        self._turn = asyncio.Lock()
        self._running: _Running | None = None
        self._asking: asyncio.Task[tuple[bytes, bytes]] | None = None
        self._is_stopped = False

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._running.process.pid if self._running is not None else None

    async def rebuild(self, asked: Asked, parts: list[bytes] | list[bytearray]) -> RebuiltRequest:
        """As `fields.rebuild`; empties `parts`. Raises `Unavailable` when the process cannot be started, dies, or takes too long."""
        await self._turn.acquire()
        # A task of its own: who asked may go, but what is half written or half read would be taken for the next one's.
        self._asking = asyncio.ensure_future(self._ask(asked, parts))
        self._asking.add_done_callback(self._free)
        facts, opening = await asyncio.shield(self._asking)
        return read_answer(facts, opening)

    async def stop(self) -> None:
        """End the process."""
        self._is_stopped = True
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
        await self._end(_STOP_TIMEOUT_S)

    def _free(self, asking: asyncio.Task[tuple[bytes, bytes]]) -> None:
        self._turn.release()
        if not asking.cancelled():
            asking.exception()  # seen, even when nobody waits for it any more

    async def _ask(self, asked: Asked, parts: list[bytes] | list[bytearray]) -> tuple[bytes, bytes]:
        size = sum(map(len, parts))
        try:
            async with asyncio.timeout(self._read_timeout_s):
                return await _exchange(await self._started(), asked, parts)
        except (OSError, EOFError, TimeoutError) as error:
            log.error("the reader of large bodies failed", error=repr(error), bytes=size)
            await self._end(0.0)
            raise Unavailable(
                "reading the body failed; try again, or send a body of less than 256 KiB", code="large_body_unread"
            ) from error
        except asyncio.CancelledError:  # only at a stop
            await self._end(0.0)
            raise

    async def _started(self) -> _Running:
        if self._running is not None and self._running.process.poll() is None:
            return self._running
        await self._end(0.0)
        if self._is_stopped:
            raise ConnectionError("the gateway is stopping")
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = _start(theirs, self._memory_bytes)
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_BUFFER_BYTES)
        self._running = _Running(process, reader, writer)
        return self._running

    async def _end(self, patience_s: float) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        running.writer.transport.abort()  # what is not written yet has nobody to read it
        with suppress(OSError):
            await running.writer.wait_closed()
        await asyncio.to_thread(_reap, running.process, patience_s)


async def _exchange(running: _Running, asked: Asked, parts: list[bytes] | list[bytearray]) -> tuple[bytes, bytes]:
    running.writer.write(question(asked, sum(map(len, parts))))
    for part in parts:
        running.writer.write(part)
        await running.writer.drain()
    parts.clear()
    facts_size, opening_size = HEAD.unpack(await running.reader.readexactly(HEAD.size))
    facts = await running.reader.readexactly(facts_size)
    return facts, await running.reader.readexactly(opening_size)


def _start(theirs: socket.socket, memory_bytes: int) -> subprocess.Popen[bytes]:
    # `-P`: nothing is imported from wherever the gateway was started.
    argv = [sys.executable, "-P", "-m", "gateway.proxy.reading", str(memory_bytes)]
    return subprocess.Popen(argv, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=_ENVIRONMENT, cwd="/")


def _reap(process: subprocess.Popen[bytes], patience_s: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        if patience_s:
            process.wait(patience_s)
    process.kill()
    process.wait()
