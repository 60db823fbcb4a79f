"""One connection of a client: requests are framed one at a time, and each is answered before the next is looked at.

    a head ──▶ its body, while the answer is made ──▶ whole and answered ──▶ the next head, or the end
                     └─ answered early: the rest is read and dropped ─┘
    a refusal ──▶ answered in its turn ──▶ what still comes is dropped, nothing is framed any more ──▶ the end

So an error waits until what came before it was answered, nothing runs that stands behind a refusal, and whether the
connection lives is decided in one place, when the request is whole and answered.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING, Any

import orjson
import uvicorn
from uvicorn.server import ServerState

from ..proxy.asgi import Headers, Scope
from ..proxy.errors import error_body
from .answer import STATUS_LINES, Answer
from .framing import End, Framer
from .heads import Head, Refusal, route_path

if TYPE_CHECKING:
    from .door import Door

# What waits to be framed, or to be taken by the application, before no more is read.
HIGH_WATER_BYTES = 64 * 2**10
# A body that was answered before all of it had come is read on, so that its sender gets to read the answer: a client
# that is cut off while it sends sees a lost connection, and tries again. Nothing of it is kept. With a key as much as
# the largest data file by default, and as long as 30 MB take at 5 Mbit/s; a sender that stops has read the answer, or
# never will.
MAX_REFUSED_BODY_BYTES = 512 * 2**20
MAX_STRANGERS_BODY_BYTES = 2**20
REFUSED_BODY_PAUSE_S = 3.0
# A read may hold thousands of tiny chunks: others have their turn in between.
_EVENTS_AT_ONCE = 8


class Connection(asyncio.Protocol):
    """What the door makes of each socket that it accepts."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        door: Door,
    ) -> None:
        self._app: Any = config.loaded_app
        self._keep_alive_s = config.timeout_keep_alive
        self._server_state = server_state
        self._app_state = app_state
        self._loop = asyncio.get_running_loop()
        self._door = door
        self._framer = Framer()
        self._answer: Answer | None = None
        self._is_dropping = False  # of a request that was answered, or of anything
        self._is_ending = False  # nothing is framed any more
        self._is_stopping = False
        self._is_lost = False
        self._is_reading_paused = False
        self._is_resuming = False
        self._writable: asyncio.Future[None] | None = None
        self._dropped_bytes = 0
        self._since = self._heard_at = 0.0
        self._is_idle = False
        self.transport: asyncio.Transport
        self.client: tuple[str, int] | None = None
        self.accepted_at = monotonic()
        self._is_made = False
        self._gives_way = False
        self.has_shown_key = False
        """Whether any of its requests came with a key that counts."""

    # ---- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The clock of the first request runs from here."""
        self.transport = transport  # type: ignore[assignment]
        self._server_state.connections.add(self)  # type: ignore[arg-type]
        self.client = _address(transport.get_extra_info("peername"))
        self._server_address = _address(transport.get_extra_info("sockname"))
        self._is_made = True
        self._since = monotonic()
        if self._gives_way:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The request that is being answered must know, and none is begun."""
        self._is_lost = self._is_ending = True
        self._server_state.connections.discard(self)
        self._door.left(self)
        if self._answer is not None:
            self._answer.lose()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        """Frame it, or drop it."""
        if self._is_dropping and self._is_over_cap(len(data)):
            self.cut()
        elif not self._is_ending:
            if self._answer is None and self._framer.pending == 0:
                self._wait_for_head()
            self._framer.feed(data)
            self._advance()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        if self._writable is None:
            self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """It has caught up, or is gone."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    # ---- The server's side

    def shutdown(self) -> None:
        """Close as soon as the present answer is complete."""
        self._is_stopping = True
        if self._answer is None or self._answer.is_complete:
            self.transport.close()
        else:
            self._answer.keeps_alive = False

    def retire(self) -> None:
        """Close where nothing is under way; else answer what is, or what comes first, and then close."""
        if self._answer is None and self._is_idle:
            self.transport.close()
        self._is_stopping = True
        if self._answer is not None:
            self._answer.keeps_alive = False

    def is_late(self, clock: float, *, headers_timeout_s: float, refused_body_timeout_s: float) -> bool:
        """Whether it has been waited for long enough: for a head, for the next request, for the end of what is dropped.

        One that gives way has until the next look to read what it was owed.
        """
        if self._gives_way:
            return True
        waited_s = clock - self._since
        if self._is_dropping:
            return waited_s > refused_body_timeout_s or clock - self._heard_at > REFUSED_BODY_PAUSE_S
        if self._answer is not None:
            return False
        return waited_s > (self._keep_alive_s if self._is_idle else headers_timeout_s)

    def show_key(self) -> bool:
        """A request came with a key that counts: whether there is room for it."""
        if not self.has_shown_key:
            self.has_shown_key = self._door.shows_key(self)
        return self.has_shown_key

    def give_way(self) -> None:
        """End for somebody else: nothing more is read. A known one is idle, and may still be reading its last answer."""
        self._gives_way = self._is_ending = True
        if self.has_shown_key:
            self.transport.close()
        elif self._is_made:
            self.transport.abort()

    @property
    def is_idle(self) -> bool:
        """Whether it waits for the client's next request, of which nothing has come."""
        return self._answer is None and self._is_idle and not self._is_dropping

    # ---- From bytes to requests

    def _advance(self) -> None:
        """Frame what there is, up to the end of the present request."""
        for _ in range(_EVENTS_AT_ONCE):
            if self._is_ending or (self._answer is not None and self._answer.is_whole):
                break
            event = self._framer.next()
            if event is None:
                break
            if isinstance(event, bytes):
                self._add(event)
            elif event is End.END:
                self._end_request()
            elif isinstance(event, Head):
                self._begin(event)
            elif isinstance(event, Refusal):
                self._refuse(event)
        else:
            self._advance_later()
        self.update_reading()

    def _advance_later(self) -> None:
        if not self._is_resuming:
            self._is_resuming = True
            self._loop.call_soon(self._advance_now)

    def _advance_now(self) -> None:
        self._is_resuming = False
        if not self._is_ending:
            self._advance()

    def _begin(self, head: Head) -> None:
        self._is_idle = False
        if self.has_shown_key:
            self._door.begins(self)
        answer = self._answer = Answer(head, self)
        answer.keeps_alive &= not self._is_stopping
        task = self._loop.create_task(answer.run(self._app, self._scope(head)))
        self._server_state.tasks.add(task)
        task.add_done_callback(self._server_state.tasks.discard)

    def _scope(self, head: Head) -> Scope:
        raw_path, _, query = head.target.partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "method": head.method,
            "scheme": "http",
            "path": route_path(raw_path),
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": head.headers,
            "server": self._server_address,
            "client": self.client,
            "state": self._app_state.copy(),
        }

    def _add(self, part: bytes) -> None:
        if self._answer is not None and not self._answer.is_complete:
            self._answer.add(part)

    def _end_request(self) -> None:
        if self._answer is not None:
            self._answer.end_body()
            if self._answer.is_complete:
                self._finish(self._answer)

    def _refuse(self, refusal: Refusal) -> None:
        if self._answer is None:
            self._write_refusal(refusal)
        elif self._answer.is_complete:
            self._end()  # it has its answer
        else:
            self._answer.break_body(refusal)

    # ---- From answers to bytes

    @property
    def default_headers(self) -> Headers:
        """What every answer says."""
        return self._server_state.default_headers

    @property
    def is_write_paused(self) -> bool:
        """Whether the client's buffer is full."""
        return self._writable is not None

    async def writable(self) -> None:
        """Wait until it is not."""
        while self._writable is not None:
            await asyncio.shield(self._writable)

    def write(self, data: bytes) -> None:
        """To the client, if it is still there."""
        if not self.transport.is_closing():
            self.transport.write(data)

    def answered(self) -> None:
        """The present request has its answer; the rest of its body, if there is one, is read and dropped."""
        answer = self._answer
        if answer is None or self._is_lost:
            return
        self._server_state.total_requests += 1
        if answer.refusal is not None:
            self._end(is_unread=True)
        elif answer.is_whole:
            self._finish(answer)
            self._advance()
        else:
            self._drop()
            self.update_reading()

    def refuse_body(self, refusal: Refusal) -> None:
        """The application wants a body that cannot be read."""
        if self._answer is None:
            return
        is_written = self._answer.is_written
        self._answer.lose()
        if is_written:
            self.cut()
        else:
            self._write_refusal(refusal)

    def _finish(self, answer: Answer) -> None:
        """The one place where it is decided whether the connection lives: the request is whole and answered."""
        self._answer = None
        self._is_dropping = False
        self._dropped_bytes = 0
        self._rest()
        if not answer.keeps_alive or self._is_stopping:
            self._end()
            return
        self._is_idle = self._framer.pending == 0
        self._since = monotonic()

    def _write_refusal(self, refusal: Refusal) -> None:
        body = orjson.dumps(error_body(refusal.status, refusal.message, code=refusal.code))
        dated = b"".join(b"%b: %b\r\n" % header for header in self.default_headers)
        self.write(
            b"%b%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (STATUS_LINES[refusal.status], dated, len(body), body)
        )
        self._end(is_unread=True)

    def _end(self, *, is_unread: bool = False) -> None:
        """Say that nothing follows. With bytes unread, closing would reset the connection, and the client would lose the
        answer that it has not read: so these are dropped first.
        """
        self._is_ending = True
        if not (is_unread or self._framer.pending or self._is_reading_paused or self._is_dropping):
            self.transport.close()
            return
        self._framer = Framer()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        if not self._is_dropping:
            self._drop()
        self.update_reading()

    def cut(self) -> None:
        """Close, whatever is unread or unsaid."""
        self._is_ending = True
        if self._answer is not None:
            self._answer.lose()
        self._rest()
        if self._gives_way or self.is_write_paused:
            self.transport.abort()  # who takes nothing would have it all kept for a minute
        else:
            self.transport.close()

    # ---- Reading

    def _wait_for_head(self) -> None:
        self._is_idle = False
        self._since = monotonic()

    def _rest(self) -> None:
        if self.has_shown_key:
            self._door.rests(self)

    def _drop(self) -> None:
        self._is_dropping = True
        self._rest()
        self._since = self._heard_at = monotonic()

    def _is_over_cap(self, more: int) -> bool:
        self._heard_at = monotonic()
        self._dropped_bytes += more
        is_owed_more = not self._is_ending and self._answer is not None and self._answer.has_known_key
        return self._dropped_bytes > (MAX_REFUSED_BODY_BYTES if is_owed_more else MAX_STRANGERS_BODY_BYTES)

    def update_reading(self) -> None:
        """Read no further than the application takes, and than one answer behind the other allows."""
        waits = self._is_resuming or (
            not self._is_dropping
            and self._answer is not None
            and (self._answer.buffered > HIGH_WATER_BYTES or self._framer.pending > HIGH_WATER_BYTES)
        )
        if waits == self._is_reading_paused or self.transport.is_closing():
            return
        self._is_reading_paused = waits
        if waits:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()


def _address(found: Any) -> tuple[str, int] | None:
    """Host and port, of a TCP socket."""
    return (str(found[0]), int(found[1])) if isinstance(found, tuple) and len(found) >= 2 else None
