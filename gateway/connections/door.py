"""Where connections come in. The policy is `room.Room`'s; here sockets are accepted, and those who have to go are cut.

The event loop's own accepting takes all that waits at once, a flood in one turn, before anything can be said about it;
and when it finds no file it closes what waits, customers too. So this accepts by itself, a few at a turn. What fails:

- Strangers come faster than anybody can send a head: those who come wait in the kernel's queue until the stranger who
  would go for them has had its time. So a small room is no reason to lose a customer, and a flood costs little.
- No file is left although connections keep within their limit: something else eats them. A stranger goes for each who
  comes in; where there is none, those who come wait, and are looked at ten times a second.
- A file is closed a turn after its connection was cut, or once the client has read what it was owed: until then it
  counts, and if many such are left, nobody comes in for a moment.
- A connection is cut before it was made: it ends when it is made.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from time import monotonic

import structlog

from ..metrics import Metrics
from .connection import Connection
from .room import Cut, Room, Size, neighbourhood

log = structlog.get_logger(__name__)

# Of connections that are cut and not yet closed. Part of what is reserved beside connections.
_CLOSING_FILES = 32
_LACKS_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_PAUSE_S = 0.1
# What every stranger has to show a key in. A client sends its head when it is connected, and the kernel connects it
# before it is accepted: this is for clients that are slow themselves. Longer, and who waits behind a flood waits longer.
_GRACE_S = 0.02
_TELL_EVERY_S = 10.0


class Door:
    """Accepts connections, and says who stays."""

    def __init__(self, size: Size, metrics: Metrics) -> None:
        self._room: Room[Connection] = Room(size)
        self._metrics = metrics
        self._listening: list[socket.socket] = []
        self._make: Callable[[], Connection]
        self._open_files = 0
        self._attaching: set[asyncio.Task[None]] = set()
        self._is_closed = True
        self._untold: Counter[str] = Counter()
        self._told_at = 0.0
        metrics.connections.labels("stranger").set_function(lambda: self._room.strangers)
        metrics.connections.labels("known").set_function(lambda: self._room.known)
        metrics.connections_limit.set(size.total)

    # ---- The server's side

    def open(self, listening: Sequence[socket.socket], make: Callable[[], Connection], *, backlog: int) -> None:
        """Accept from now on."""
        self._loop = asyncio.get_running_loop()
        self._make = make
        self._listening = list(listening)
        self._is_closed = False
        for found in listening:
            found.setblocking(False)
            found.listen(backlog)
        self._resume()

    def close(self) -> None:
        """Accept nothing more. The sockets are their owner's to close."""
        self._is_closed = True
        self._pause()

    def hand_over(self) -> None:
        """Accept nothing more, another process does on the same sockets. Who is in stays."""
        self._pause()
        self._listening = []

    def tell(self, clock: float) -> None:
        """Log who had to go, every now and then: under a flood that is thousands a second."""
        if self._untold and clock - self._told_at >= _TELL_EVERY_S:
            self._told_at = clock
            log.warning(
                "connections were cut to make room, by reason",
                **self._untold,
                strangers_now=self._room.strangers,
                known_now=self._room.known,
                limit=self._room.size.total,
            )
            self._untold.clear()

    # ---- Coming in

    def _resume(self) -> None:
        if not self._is_closed:
            for found in self._listening:
                self._loop.add_reader(found, self._accept, found)

    def _pause(self) -> None:
        for found in self._listening:
            self._loop.remove_reader(found)

    def _accept(self, listening: socket.socket) -> None:
        """A few that wait. The loop calls again while there are more."""
        for _ in range(self._room.newcomers_at_a_turn):
            if self._open_files >= self._room.size.total + _CLOSING_FILES:
                self._wait(_PAUSE_S)
                return
            if self._room.is_full and (left_s := self._grace_left_s()) > 0:
                self._wait(left_s)
                return
            try:
                made, address = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _LACKS_FILES:
                    self._do_without()
                    return
                continue  # it was gone before it was let in
            self._let_in(made, neighbourhood(address[0]) if isinstance(address, tuple) else "")

    def _let_in(self, made: socket.socket, address: str) -> None:
        made.setblocking(False)
        connection = self._make()
        self._open_files += 1
        self._cut(self._room.enter(connection, address))
        task = self._loop.create_task(self._attach(made, connection))
        self._attaching.add(task)
        task.add_done_callback(self._attaching.discard)

    async def _attach(self, made: socket.socket, connection: Connection) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: connection, made)
        except OSError:  # it was gone before it was made
            made.close()
            self.left(connection)
            return
        if self._is_closed:
            connection.shutdown()

    def _do_without(self) -> None:
        self._untold["no_file"] += 1
        left_s = self._grace_left_s()
        if left_s > 0:
            self._wait(left_s)
        else:
            self._cut(self._room.do_without())

    def _grace_left_s(self) -> float:
        """How long the stranger who goes first still has; where there is none, a pause."""
        first = self._room.first_to_go()
        return _PAUSE_S if first is None else first.accepted_at + _GRACE_S - monotonic()

    def _wait(self, pause_s: float) -> None:
        """The loop would call again at once, for as long as somebody waits."""
        self._pause()
        self._loop.call_later(pause_s, self._resume)

    # ---- Staying, and going

    def shows_key(self, connection: Connection) -> bool:
        """Whether it may stay as a known one."""
        cut = self._room.show_key(connection)
        if cut is not None and cut.guest is connection:
            self._note(cut)
            return False
        self._cut(cut)
        return True

    def begins(self, connection: Connection) -> None:
        """A known one is being answered."""
        self._room.begin(connection)

    def rests(self, connection: Connection) -> None:
        """A known one has its answer."""
        self._room.rest(connection)

    def left(self, connection: Connection) -> None:
        """Its file is closed."""
        self._open_files -= 1
        self._room.leave(connection)

    def _cut(self, cut: Cut[Connection] | None) -> None:
        if cut is not None:
            self._note(cut)
            cut.guest.give_way()

    def _note(self, cut: Cut[Connection]) -> None:
        self._metrics.connections_cut.labels(cut.reason).inc()
        self._untold[cut.reason] += 1
