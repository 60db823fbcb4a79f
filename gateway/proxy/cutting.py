"""What ends a request before its time: its client, a deadline, a client that does not read, a shutdown."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

BODY_TIMEOUT_S = 30.0
SLOW_CLIENT_TIMEOUT_S = 30.0

Reason = Literal["disconnect", "deadline", "body_timeout", "slow_client", "shutdown"]


@dataclass(frozen=True)
class Timeouts:
    """How long a request may take, and each of its parts."""

    request_s: float
    body_s: float = BODY_TIMEOUT_S
    slow_client_s: float = SLOW_CLIENT_TIMEOUT_S


class Cutter:
    """Cancels the task of one request, once, and tells afterwards why."""

    __slots__ = ("_deadline", "_look_again", "_slow_client_s", "_task", "reason", "sending_since")

    def __init__(self, timeouts: Timeouts) -> None:
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        loop = asyncio.get_running_loop()
        self._slow_client_s = timeouts.slow_client_s
        self._deadline = loop.call_later(timeouts.request_s, self.cut, "deadline")
        self._look_again = loop.call_later(timeouts.body_s, self.cut, "body_timeout")
        self.reason: Reason | None = None
        self.sending_since: float | None = None

    def body_is_read(self) -> None:
        """From reading to answering: now the client must take what it is sent."""
        self._look_again.cancel()
        if self._task is not None:
            self._look_again = self._task.get_loop().call_later(self._slow_client_s / 2, self._look)

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

    def close(self) -> None:
        """From now on nothing is cut."""
        self._task = None
        self._deadline.cancel()
        self._look_again.cancel()

    def _look(self) -> None:
        if self._task is None:
            return
        if self.sending_since is not None and perf_counter() - self.sending_since >= self._slow_client_s:
            self.cut("slow_client")
            return
        self._look_again = self._task.get_loop().call_later(self._slow_client_s / 4, self._look)
