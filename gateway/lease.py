"""One controller acts: a lease in the database, taken by compare-and-swap and fenced by an epoch.

No wall clock decides. A holder is as old as its last renewal by its own monotonic clock, and a candidate takes the lease
over when the row has not changed for a while by its own; so a clock that jumps a day moves nothing.

A holder may be stopped in the middle of a step and go on with it when another has long taken over. So the row is asked
again where it counts: in every transaction that the holder writes (`Database.fence_with`), and right before it starts or
ends a process or has the engine drop an adapter.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from collections.abc import Callable
from datetime import datetime, timedelta

import structlog
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from . import tables
from .database import Database
from .errors import Conflict, GatewayError
from .ids import now
from .processes import look_at

log = structlog.get_logger(__name__)

RENEW_S = 1.0
EXPIRE_S = 5.0
_LOOK_S = 0.2


# Without a renewal for longer than this, nobody looks after engines: what the tables say of them is worth nothing.
FRESH_WITHIN_S = 15.0


async def seconds_silent(connection: AsyncConnection, name: str = "controller") -> float:
    """Since the controller last renewed its lease, by this host's clock; infinite when none ever had it.

    For people and for moves of traffic, which may wait; who acts is decided by no clock.
    """
    return silence(await lease_until(connection, name))


async def lease_until(connection: AsyncConnection, name: str = "controller") -> datetime | None:
    """When the lease runs out unless it is renewed; None when nobody ever had it."""
    table = tables.leases
    found: datetime | None = await connection.scalar(select(table.c.expires_at).where(table.c.name == name))
    return found


def silence(expires_at: datetime | None) -> float:
    """The same, from the lease's row."""
    return math.inf if expires_at is None else max(0.0, (now() - expires_at).total_seconds() + EXPIRE_S)


async def residency_is_fresh(connection: AsyncConnection) -> bool:
    """Whether what the tables say of replicas and residency is kept by somebody alive."""
    return await seconds_silent(connection) <= FRESH_WITHIN_S


class LeaseLost(Conflict):
    """Another controller acts now; this one must stop."""

    code = "lease_lost"


def identity(pid: int | None = None) -> str:
    """Who holds a lease: this machine, this process, this start of it."""
    seen = look_at(pid or os.getpid())
    return f"{socket.gethostname()[:40]}/{pid or os.getpid()}/{seen.started if seen else 0}"


def is_gone(holder: str) -> bool:
    """Whether a holder is surely dead: it ran on this machine and no such process does. False when one cannot tell."""
    host, _, rest = holder.partition("/")
    pid, _, started = rest.partition("/")
    if host != socket.gethostname()[:40] or not pid.isdigit():
        return holder == ""
    seen = look_at(int(pid))
    return seen is None or seen.is_zombie or str(seen.started) != started


class Lease:
    """The right to act, of one name."""

    def __init__(
        self,
        database: Database,
        name: str = "controller",
        *,
        holder: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._name = name
        self._clock = clock
        self.holder = holder or identity()
        self.epoch = 0
        self._renewed_at: float | None = None

    @property
    def is_held(self) -> bool:
        """Whether acting is still right: renewed so lately that nobody can have taken over."""
        return self._renewed_at is not None and self._clock() - self._renewed_at < EXPIRE_S

    def check(self) -> None:
        """Raise `LeaseLost` unless it is held."""
        if not self.is_held:
            raise LeaseLost("the lease of the controller ran out before it could be renewed")

    async def fence(self, connection: AsyncConnection) -> None:
        """Raise `LeaseLost` unless it is ours in this very transaction, whatever our own clock says."""
        table = tables.leases
        mine = (table.c.name == self._name) & (table.c.holder == self.holder) & (table.c.epoch == self.epoch)
        # Shared lock: nobody takes the lease over before the transaction has ended.
        found = await connection.execute(select(table.c.epoch).where(mine).with_for_update(read=True))
        if found.one_or_none() is None:
            raise LeaseLost("another controller has taken over")

    async def acquire(self) -> None:
        """Wait until it is ours."""
        seen: tuple[object, ...] | None = None
        unchanged_since = self._clock()
        told = False
        while True:
            row = await self._row()
            if row != seen:
                seen, unchanged_since = row, self._clock()
            if row is None or self._may_follow(str(row[0])) or self._clock() - unchanged_since > EXPIRE_S:
                if await self._take(row):
                    log.info("lease taken", holder=self.holder, epoch=self.epoch)
                    return
            elif not told:
                log.info("another controller holds the lease; waiting", holder=row[0])
                told = True
            await asyncio.sleep(_LOOK_S)

    def _may_follow(self, holder: str) -> bool:
        """At once: a dead one, and oneself, who let it run out. Nobody else is this very process."""
        return holder == self.holder or is_gone(holder)

    async def keep(self) -> None:
        """Renew until cancelled. Raises `LeaseLost` as soon as it is another's or could not be renewed in time."""
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self.renew()
            except LeaseLost:
                raise
            except GatewayError as error:
                log.warning("lease not renewed; trying again", error=error.message)
                self.check()

    async def renew(self) -> None:
        """Once. Raises `LeaseLost` when somebody else has it."""
        asked_at = self._clock()
        if not await self._swap({"expires_at": now() + timedelta(seconds=EXPIRE_S)}):
            self._renewed_at = None
            raise LeaseLost("another controller has taken over")
        self.check()  # woken after a long sleep: the row may be ours still, and yet it was not for a while
        self._renewed_at = asked_at

    async def release(self) -> None:
        """Let the next one have it at once."""
        if self._renewed_at is not None:
            self._renewed_at = None
            await self._swap({"holder": "", "expires_at": now()})

    async def _row(self) -> tuple[object, ...] | None:
        table = tables.leases
        query = select(table.c.holder, table.c.epoch, table.c.expires_at).where(table.c.name == self._name)
        async with self._database.read() as connection:
            found = (await connection.execute(query)).one_or_none()
        return tuple(found) if found else None

    async def _take(self, seen: tuple[object, ...] | None) -> bool:
        """Compare-and-swap from what was seen; the epoch rises with every holder."""
        asked_at = self._clock()
        table = tables.leases
        values = {"holder": self.holder, "expires_at": now() + timedelta(seconds=EXPIRE_S)}
        async with self._database.write(is_fenced=False, urgent=True) as connection:
            query = select(table.c.holder, table.c.epoch, table.c.expires_at).where(table.c.name == self._name)
            found = (await connection.execute(query)).one_or_none()
            if (tuple(found) if found else None) != seen:
                return False
            epoch = int(found.epoch) + 1 if found else 1
            if found:
                await connection.execute(update(table).where(table.c.name == self._name).values(**values, epoch=epoch))
            else:
                await connection.execute(insert(table).values(name=self._name, epoch=epoch, **values))
        self.epoch, self._renewed_at = epoch, asked_at
        return True

    async def _swap(self, values: dict[str, object]) -> bool:
        table = tables.leases
        mine = (table.c.name == self._name) & (table.c.holder == self.holder) & (table.c.epoch == self.epoch)
        async with self._database.write(is_fenced=False, urgent=True) as connection:
            changed = await connection.execute(update(table).where(mine).values(values))
        return changed.rowcount == 1
