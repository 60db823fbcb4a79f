"""Signs of life of an engine: it is asked again and again, and what counts is whether it works on that, not how long it takes.

A question is open from the moment it is due until the engine has produced a token, for us or for anybody. While one is
open two things are measured: how long there was no sign of work at all (no token, no CPU time, nobody reading weights),
and how long it computed without a single token. Slowness shows in neither; a hang shows in the first, a livelock in the second.
"""

from __future__ import annotations

import asyncio
import time

from ..errors import GatewayError
from ..settings import EngineSettings
from .admin import EngineAdmin, EngineUnreachable
from .lifecycle import PATIENCE_WITH_WORK, Health
from .models import ReplicaUsage

# Share of the time in which the processes held a core or waited for one, so that other load on the machine changes
# nothing. A server whose core hangs still answers our questions, with far less. Where a kernel does not tell who waits,
# a computing engine on a crowded machine may have had little.
_WANTS_A_CORE = 0.3
_HAS_A_CORE = 0.05
_READS_BYTES_PER_S = 2**20
_CANARY_TOKEN = 1


def is_working(before: ReplicaUsage | None, after: ReplicaUsage | None) -> bool:
    """Whether the replica's processes computed, waited for a core, or read files between two looks at them."""
    if before is None or after is None or after.at_s <= before.at_s:
        return False
    took_s = after.at_s - before.at_s
    used_s = after.cpu_s - before.cpu_s
    if before.waited_s is None or after.waited_s is None:
        computed = used_s > _HAS_A_CORE * took_s
    else:
        computed = used_s + after.waited_s - before.waited_s > _WANTS_A_CORE * took_s
    return computed or after.read_bytes - before.read_bytes > _READS_BYTES_PER_S * took_s


class Pulse:
    """Keeps asking one engine for a sign of life. Its server answering is not enough: the core must do work."""

    def __init__(self, admin: EngineAdmin, engine: EngineSettings, *, has_worked: bool = False) -> None:
        self._admin = admin
        self._engine = engine
        self.health: Health = "unknown"
        self.watches_core = False
        self.has_worked = has_worked  # since its start; the first work has an allowance of its own
        self._open_since: float | None = None  # monotonic; when the unanswered question was due
        self._worked_at = 0.0
        self._busy_at = self._looked_at = time.monotonic()  # until two looks at its processes can tell
        self._usage: ReplicaUsage | None = None
        self._tokens: float | None = None
        self._canary: asyncio.Task[str] | None = None

    # ---- What is known

    @property
    def silent_s(self) -> float:
        """How long the engine has shown no sign of work at all though it was asked to."""
        return self._since(self._worked_at, self._busy_at)

    @property
    def fruitless_s(self) -> float:
        """How long it has produced no token, computing or not, though it was asked to."""
        return self._since(self._worked_at)

    @property
    def is_busy(self) -> bool:
        """Whether it was computing when it was last looked at, or shortly before. Who does not look, does not know better."""
        return self._looked_at - self._busy_at < self._engine.hang_timeout_s

    def _since(self, *signs: float) -> float:
        return 0.0 if self._open_since is None else time.monotonic() - max(self._open_since, *signs)

    def forgive(self) -> None:
        """Begin to count silence anew."""
        if self._open_since is not None:
            self._open_since = time.monotonic()

    def note_usage(self, usage: ReplicaUsage | None) -> None:
        """A look at the engine's processes."""
        if is_working(self._usage, usage):
            self._busy_at = time.monotonic()
        if usage is None:  # a driver that cannot tell: then nothing speaks for the engine but its tokens
            self._looked_at = time.monotonic()
        elif self._usage is None or usage.at_s > self._usage.at_s:
            self._usage = usage
            self._looked_at = time.monotonic()

    def _note_work(self, *, is_answered: bool) -> None:
        self.has_worked = True
        self._worked_at = time.monotonic()
        self._open_since = None if is_answered else self._worked_at

    # ---- Looking

    async def run(self) -> None:
        """Until cancelled."""
        next_question = 0.0
        try:
            while True:
                if self.watches_core and time.monotonic() >= next_question:
                    self._ask()
                await self._look()
                if self._open_since is not None:
                    await self._look_for_tokens()
                if self._take_answer():
                    next_question = time.monotonic() + self._engine.hang_timeout_s / 5
                await asyncio.sleep(self._engine.health_interval_s)
        finally:
            if self._canary is not None:
                self._canary.cancel()

    def _ask(self) -> None:
        """One token of the base model. Behind a long queue it comes late: then others' tokens are the sign of life."""
        if self._open_since is None:
            self._open_since = time.monotonic()
        if self._canary is None:
            timeout_s = PATIENCE_WITH_WORK * max(self._engine.hang_timeout_s, self._engine.first_work_timeout_s)
            asked = self._admin.generate(self._admin.base_model, [_CANARY_TOKEN], max_tokens=1, timeout_s=timeout_s)
            self._canary = asyncio.create_task(asked, name="canary")

    def _take_answer(self) -> bool:
        """Whether the question was answered; one that failed stays open and is asked again."""
        canary = self._canary
        if canary is None or not canary.done():
            return False
        self._canary = None
        if canary.cancelled() or isinstance(canary.exception(), GatewayError):
            return False
        canary.result()
        self._note_work(is_answered=True)
        return True

    async def _look(self) -> None:
        try:
            answer = await self._admin.is_healthy(self._engine.hang_timeout_s / 2)
            self.health = "healthy" if answer else "dead"
        except EngineUnreachable:
            self.health = "silent"

    async def _look_for_tokens(self) -> None:
        try:
            tokens = await self._admin.work_done(self._engine.hang_timeout_s / 5)
        except EngineUnreachable:
            return
        if tokens is not None and self._tokens is not None and tokens != self._tokens:
            self._note_work(is_answered=False)
        self._tokens = tokens
