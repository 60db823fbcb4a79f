"""What ends a request before its time: its client, a deadline, a client that does not read, a shutdown, a rollback."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal

BODY_TIMEOUT_S = 30.0
SLOW_CLIENT_TIMEOUT_S = 30.0
_SWEEPS_IN_A_TIMEOUT = 8
_LONGEST_SWEEP_S = 0.25

Reason = Literal["disconnect", "deadline", "body_timeout", "slow_client", "shutdown", "rolled_back"]


@dataclass(frozen=True)
class Timeouts:
    """How long a request may take, and each of its parts."""

    request_s: float
    body_s: float = BODY_TIMEOUT_S
    slow_client_s: float = SLOW_CLIENT_TIMEOUT_S


class Cutter:
    """Cancels the task of one request, once, and tells afterwards why."""

    __slots__ = ("_task", "deadline", "is_reading_body", "reason", "sending_since", "started", "variant")

    def __init__(self, timeouts: Timeouts) -> None:
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self.started = monotonic()
        self.deadline = self.started + timeouts.request_s
        self.is_reading_body = True
        self.reason: Reason | None = None
        self.variant: str | None = None  # what answers, once that is known
        self.sending_since: float | None = None

    def cut(self, reason: Reason) -> None:
        """End the request, unless it has ended already."""
        if self._task is not None and self.reason is None:
            self.reason = reason
            self._task.cancel()

    def take_back(self) -> Reason | None:
        """After a cancellation: why it was cut, and the task goes on; None when the cancellation was not ours."""
        if self.reason is not None and self._task is not None:
            self._task.uncancel()
        return self.reason

    def body_is_whole(self) -> None:
        """From now on it is not the client that takes long."""
        self.is_reading_body = False

    def close(self) -> None:
        """From now on nothing is cut."""
        self._task = None


class Cutters:
    """All open requests, looked over a few times a second: a timer for each would cost more than the rest of this."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.timeouts = timeouts
        self._open: set[Cutter] = set()
        self._is_armed = False
        shortest = min(timeouts.request_s, timeouts.body_s, timeouts.slow_client_s)
        self._interval_s = min(_LONGEST_SWEEP_S, shortest / _SWEEPS_IN_A_TIMEOUT)

    def open(self) -> Cutter:
        """The cutter of the request that the current task answers."""
        cutter = Cutter(self.timeouts)
        self._open.add(cutter)
        if not self._is_armed:
            self._arm()
        return cutter

    def close(self, cutter: Cutter) -> None:
        """The request is over."""
        cutter.close()
        self._open.discard(cutter)

    def cut_all(self, reason: Reason) -> None:
        """End every open request."""
        for cutter in list(self._open):
            cutter.cut(reason)

    def cut_variants(self, variants: Collection[str]) -> int:
        """End every open request that one of these answers; how many."""
        found = [cutter for cutter in self._open if cutter.variant in variants and cutter.reason is None]
        for cutter in found:
            cutter.cut("rolled_back")
        return len(found)

    def _arm(self) -> None:
        self._is_armed = True
        asyncio.get_running_loop().call_later(self._interval_s, self._sweep)

    def _sweep(self) -> None:
        self._is_armed = False
        now = monotonic()
        for cutter in list(self._open):
            reason = self._overdue(cutter, now)
            if reason is not None:
                cutter.cut(reason)
        if self._open:
            self._arm()

    def _overdue(self, cutter: Cutter, now: float) -> Reason | None:
        if cutter.sending_since is not None and now - cutter.sending_since >= self.timeouts.slow_client_s:
            return "slow_client"
        if cutter.is_reading_body and now - cutter.started >= self.timeouts.body_s:
            return "body_timeout"
        return "deadline" if now >= cutter.deadline else None
