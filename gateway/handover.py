"""The listening socket, and how it passes from a gateway that drains to the one that takes its place.

A gateway whose supervisor was killed goes on until its streams have ended. Who starts meanwhile over the same home is
given the very socket that it listens on, by a descriptor through the private run directory: no moment at which nobody
listens, no connection lost that waits in the kernel's queue, and no second listener that could be anybody's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import structlog

from .errors import Invalid
from .settings import Settings

log = structlog.get_logger(__name__)

_GIVE = b"give"
_TIMEOUT_S = 2.0
# A peer that takes no byte for this long is cut off by the kernel, buffers and all.
_TCP_USER_TIMEOUT_MS = 60_000
_UCRED = "3i"


def handover_path(settings: Settings) -> Path:
    """Where a draining gateway is asked for its socket; only this user gets there."""
    return settings.run_dir / "next.sock"


def listening_socket(settings: Settings) -> socket.socket:
    """The bound socket; `Invalid` that says what to do when the address is taken."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _TCP_USER_TIMEOUT_MS)
    try:
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        raise Invalid(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; set TURNOUT_PORT to a free port",
            code="address_in_use",
            param="port",
        ) from error
    return bound


class Place:
    """Where this gateway is going to listen: an address of its own, or that of one that drains.

    The socket changes hands at the last moment, so that whoever connects meanwhile is answered by somebody.
    Raises `Invalid` when the address is another program's.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bound: socket.socket | None = None
        self._former: socket.socket | None = None
        try:
            self._bound = listening_socket(settings)
        except Invalid:
            self._former = _reach(handover_path(settings))
            if self._former is None:  # it may have ended between the two looks
                self._bound = listening_socket(settings)

    def take(self) -> socket.socket:
        """The socket to listen on now."""
        if self._bound is None and self._former is not None:
            self._bound = _received(self._former, self._settings)
            self._former.close()
        if self._bound is None:  # it has ended meanwhile, or it served another address
            self._bound = listening_socket(self._settings)
        return self._bound

    def close(self) -> None:
        """Let everything go."""
        for each in (self._bound, self._former):
            if each is not None:
                each.close()


def _reach(path: Path) -> socket.socket | None:
    asking = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    asking.settimeout(_TIMEOUT_S)
    try:
        asking.connect(str(path))
    except OSError:
        asking.close()
        return None
    return asking


def _received(former: socket.socket, settings: Settings) -> socket.socket | None:
    try:
        former.sendall(_GIVE)
        _, descriptors, _, _ = socket.recv_fds(former, 16, 1)
    except OSError as error:
        log.warning("the former gateway gave no socket", error=str(error))
        return None
    if not descriptors:
        return None
    given = socket.socket(fileno=descriptors[0])
    if not _listens_at(given, settings):
        given.close()
        return None
    log.info("took the socket over from the gateway that drains", port=settings.port)
    return given


def _listens_at(given: socket.socket, settings: Settings) -> bool:
    """Whether it is the address of these settings: one that others reach must not come along when they say loopback."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    if given.family != family or given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) != 1:
        return False
    wanted = socket.getaddrinfo(
        settings.host or None, settings.port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return given.getsockname()[:2] in [address[:2] for *_, address in wanted]


class Offer:
    """Lets the next gateway have the socket, for as long as this one drains."""

    def __init__(self, path: Path, listening: socket.socket, *, given: Callable[[], None]) -> None:
        self._path = path
        self._listening = listening
        self._given = given
        self._loop = asyncio.get_running_loop()
        self._asked: set[socket.socket] = set()
        self._inode = 0
        self._offering = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path.unlink(missing_ok=True)  # of one that was killed while it drained
            self._offering.bind(str(path))
            path.chmod(0o600)
            self._inode = path.stat().st_ino
            self._offering.listen()
            self._offering.setblocking(False)
            self._loop.add_reader(self._offering, self._accept)
        except OSError as error:
            log.warning("the next gateway has to wait for this one's end", error=str(error))

    def close(self) -> None:
        """Offer nothing more."""
        for each in (self._offering, *self._asked):
            self._loop.remove_reader(each)
            each.close()
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:  # else it is the next one's
                self._path.unlink()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            asked, _ = self._offering.accept()
            if _user(asked) != os.getuid():
                asked.close()
                return
            asked.setblocking(False)
            self._asked.add(asked)
            self._loop.add_reader(asked, self._give, asked)

    def _give(self, asked: socket.socket) -> None:
        try:
            if asked.recv(len(_GIVE)) == _GIVE:
                socket.send_fds(asked, [b"here"], [self._listening.fileno()])
                self._given()
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EINTR):
                return
            log.warning("the socket could not be given", error=str(error))
        self._loop.remove_reader(asked)
        self._asked.discard(asked)
        asked.close()


def _user(asked: socket.socket) -> int:
    credentials = asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(_UCRED))
    return int(struct.unpack(_UCRED, credentials)[1])
