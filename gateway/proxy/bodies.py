"""Bodies of completions as they come in: small ones are read here, large ones where their size holds up nobody.

A large body (over 256 KiB) is first judged by its raw bytes: how many of them open, part or name something. What
passes is parsed, checked and rebuilt by another process; here it is only a row of chunks. Large bodies share a bounded
room: who finds it full waits, unread, and not for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from ..errors import Invalid, Unavailable
from .asgi import Receive, Scope, check_encoding, declared_size, next_part, over
from .fields import Asked, RebuiltRequest, rebuild
from .large_bodies import LargeBodies

# The loop reads this much in under 15 ms, whatever it holds: measured by `deploy/bench/door.py`.
LARGE_BODY_BYTES = 256 * 2**10
# More than any prompt needs (a model reads a token for each of them, or nearly), and little enough to bound the memory
# that parsing takes.
MAX_STRUCTURE = 250_000
_STRUCTURE = b",[{:"
_CHUNK_BYTES = 64 * 2**10
_ROOM_BYTES = 64 * 2**20
_LEAST_BODIES = 4
_MAX_WAITING = 256
_MAX_WAITING_OF_ONE = 64
_WAIT_S = 10.0


@dataclass(slots=True)
class Incoming:
    """What has come of a body."""

    max_bytes: int
    parts: list[bytearray] = field(default_factory=list)
    size: int = 0
    structure: int = 0
    is_whole: bool = False

    @property
    def is_large(self) -> bool:
        """Whether it is too large to be read in this process."""
        return self.size > LARGE_BODY_BYTES

    async def take(self, receive: Receive) -> None:
        """Wait for the next part. `TooLarge` beyond the cap, `Invalid` as soon as a large body holds too much structure."""
        was_large = self.is_large
        part, more = await next_part(receive)
        self.is_whole = not more
        self._keep(part)
        self.size += len(part)
        if self.size > self.max_bytes:
            raise over(self.max_bytes)
        if self.is_large:
            self.structure += _structure_of(part) if was_large else sum(map(_structure_of, self.parts))
        if self.structure > MAX_STRUCTURE:
            raise Invalid(
                f"the first {self.size:,} bytes of the body hold {self.structure:,} of the characters , [ {{ and :; a body "
                f"over {LARGE_BODY_BYTES:,} bytes may hold {MAX_STRUCTURE:,}: send fewer elements, or several requests",
                code="too_many",
            )

    def _keep(self, part: bytes) -> None:
        # A client that sends byte by byte would else leave an object for each.
        if self.parts and len(self.parts[-1]) < _CHUNK_BYTES:
            self.parts[-1] += part
        else:
            self.parts.append(bytearray(part))


def _structure_of(part: bytes | bytearray) -> int:
    return len(part) - len(part.translate(None, _STRUCTURE))


@dataclass(frozen=True, slots=True)
class _Waiting:
    holder: str
    size: int
    turn: asyncio.Future[None]


class Room:
    """Memory for large bodies: so many bytes in all, half of them for one key. The others wait in order."""

    def __init__(self, size_bytes: int, *, wait_s: float = _WAIT_S) -> None:
        self._size = size_bytes
        self._wait_s = wait_s
        self._taken = 0
        self._taken_by: dict[str, int] = {}
        self._waiting: list[_Waiting] = []

    @property
    def taken_bytes(self) -> int:
        """How much is in use."""
        return self._taken

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @asynccontextmanager
    async def hold(self, holder: str, size: int) -> AsyncIterator[None]:
        """Room for one body, while the block runs. Raises `Unavailable` when it is long in coming."""
        await self._take(holder, size)
        try:
            yield
        finally:
            self._change(holder, -size)
            self._let_in()

    async def _take(self, holder: str, size: int) -> None:
        of_one = sum(one.holder == holder for one in self._waiting)
        if of_one >= _MAX_WAITING_OF_ONE or len(self._waiting) >= _MAX_WAITING:
            raise _crowded()
        waiting = _Waiting(holder, size, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._let_in()
        try:
            async with asyncio.timeout(self._wait_s):
                await waiting.turn
        except BaseException as error:
            self._leave(waiting)
            if isinstance(error, TimeoutError):
                raise _crowded() from error
            raise

    def _leave(self, waiting: _Waiting) -> None:
        """Give up: the place in the queue, or what was given in the very moment of giving up."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
        else:
            self._change(waiting.holder, -waiting.size)
        self._let_in()

    def _let_in(self) -> None:
        for waiting in list(self._waiting):
            if waiting.turn.cancelled():  # on its way out, and not yet past its own `_leave`
                continue
            if self._taken and self._taken + waiting.size > self._size:
                return
            if self._is_within_share(waiting):
                self._waiting.remove(waiting)
                self._change(waiting.holder, waiting.size)
                waiting.turn.set_result(None)

    def _is_within_share(self, waiting: _Waiting) -> bool:
        taken = self._taken_by.get(waiting.holder, 0)
        return not taken or taken + waiting.size <= self._size // 2

    def _change(self, holder: str, size: int) -> None:
        self._taken += size
        self._taken_by[holder] = self._taken_by.get(holder, 0) + size
        if not self._taken_by[holder]:
            del self._taken_by[holder]


class Bodies:
    """Reads the bodies of completions."""

    def __init__(self, large: LargeBodies, *, max_body_bytes: int) -> None:
        self._large = large
        self._max_body_bytes = max_body_bytes
        self.room = Room(max(_ROOM_BYTES, _LEAST_BODIES * max_body_bytes))

    async def read(
        self, asked: Asked, scope: Scope, receive: Receive, *, holder: str, on_whole: Callable[[], None]
    ) -> RebuiltRequest:
        """The request that a body holds, checked and rebuilt. `holder` is whose share of the room a large one takes."""
        declared = declared_size(scope, max_bytes=self._max_body_bytes)
        check_encoding(scope)
        incoming = Incoming(self._max_body_bytes)
        is_large = declared is not None and declared > LARGE_BODY_BYTES
        while not (is_large or incoming.is_whole):
            await incoming.take(receive)
            is_large = incoming.is_large
        if not is_large:
            on_whole()
            return rebuild(b"".join(incoming.parts), asked)
        async with self.room.hold(holder, declared or self._max_body_bytes):
            while not incoming.is_whole:
                await incoming.take(receive)
            on_whole()
            return await self._large.rebuild(asked, incoming.parts)


def _crowded() -> Unavailable:
    return Unavailable(
        f"too many bodies over {LARGE_BODY_BYTES:,} bytes at once; try again, or send fewer at a time",
        code="large_bodies_busy",
    )
