"""Steps of jobs, each on its own: what one job causes holds up no other, and nothing that nobody foresaw lasts for ever."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

import structlog

from ..errors import Conflict, GatewayError
from .models import Job

log = structlog.get_logger(__name__)

MAX_BAFFLED = 5  # failures in a row that nobody foresaw, of one step of one job, before the job is given up
GIVEN_UP = f"the controller could not handle what this job left, {MAX_BAFFLED} times; the cause is in its log"

T = TypeVar("T")


class Guard:
    """Takes steps; a job that baffles it too often is handed to `give_up`."""

    def __init__(self, give_up: Callable[[Job], Awaitable[None]]) -> None:
        self._give_up = give_up
        self._baffled: dict[tuple[str, str], int] = {}

    def forget_all_but(self, job_ids: Collection[str]) -> None:
        """Drop what is remembered of jobs that are over."""
        self._baffled = {key: failures for key, failures in self._baffled.items() if key[0] in job_ids}

    async def take(self, job: Job, step: Callable[[Job], Awaitable[T]]) -> T | None:
        """What the step returns; None when it failed, which is logged. The next look tries again."""
        key = (job.id, step.__name__)
        try:
            done = await step(job)
        except Conflict as error:
            log.info("job moved meanwhile", job=job.id, code=error.code)
            return None
        except (GatewayError, OSError) as error:
            log.warning("job could not be moved on; trying again", job=job.id, state=job.state, error=str(error))
            return None
        except Exception:
            self._baffled[key] = self._baffled.get(key, 0) + 1
            log.exception("job cannot be moved on", job=job.id, state=job.state, failures=self._baffled[key])
            if self._baffled[key] >= MAX_BAFFLED:
                await self._end(job)
            return None
        self._baffled.pop(key, None)
        return done

    async def _end(self, job: Job) -> None:
        try:
            await self._give_up(job)
        except (GatewayError, OSError) as error:
            log.warning("job could not be given up; trying again", job=job.id, error=str(error))
