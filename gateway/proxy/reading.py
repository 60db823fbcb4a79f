"""Reads large bodies in a process of its own: `python -m gateway.proxy.reading MEMORY_BYTES`, started by `large_bodies`.

Parsing holds the interpreter's lock, in a thread as well; only another process leaves the gateway its loop. It has one
socket, as standard input, and no environment, file or database. It ends when the other end of the socket is closed,
which the kernel does even for a gateway that was killed.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import struct
import sys
from dataclasses import asdict
from typing import Any

import orjson

from ..errors import Forbidden, GatewayError, Invalid, NotFound
from .checks import Bounds
from .fields import Asked, RebuiltRequest, rebuild

# A frame: the lengths of its two parts, a small JSON object, bytes.
HEAD = struct.Struct(">II")
_ERRORS: dict[str, type[GatewayError]] = {kind.__name__: kind for kind in (Invalid, Forbidden, NotFound)}
# Traffic goes first when there are fewer processors than work.
_NICENESS = 5


def question(asked: Asked, size: int) -> bytes:
    """The beginning of a question's frame; the body, `size` bytes, follows."""
    facts = orjson.dumps(asdict(asked))
    return HEAD.pack(len(facts), size) + facts


def read_answer(facts: bytes, opening: bytes) -> RebuiltRequest:
    """What an answer's frame says. Raises the error that it reports."""
    found = orjson.loads(facts)
    if "error" in found:
        raise _ERRORS[found["error"]](found["message"], code=found["code"], param=found["param"])
    return RebuiltRequest(**found, opening=opening)


def _answer(facts: bytes, body: bytearray) -> tuple[dict[str, Any], bytes]:
    try:
        made = rebuild(body, _asked(facts))
    except (Invalid, Forbidden, NotFound) as error:
        return {"error": type(error).__name__, "message": error.message, "code": error.code, "param": error.param}, b""
    said = {"model": made.model, "is_stream": made.is_stream, "wants_usage": made.wants_usage, "sticky": made.sticky}
    return said, made.opening


def _asked(facts: bytes) -> Asked:
    found = orjson.loads(facts)
    return Asked(**{**found, "bounds": Bounds(**found["bounds"])})


def _receive(connection: socket.socket, size: int) -> bytearray | None:
    """Exactly `size` bytes; None at the end."""
    content = bytearray(size)
    view = memoryview(content)
    while view:
        count = connection.recv_into(view)
        if not count:
            return None
        view = view[count:]
    return content


def _serve_one(connection: socket.socket) -> bool:
    """Answer one question; False when there will be no other."""
    head = _receive(connection, HEAD.size)
    if head is None:
        return False
    sizes = HEAD.unpack(head)
    facts, body = (_receive(connection, size) for size in sizes)
    if facts is None or body is None:
        return False
    said, opening = _answer(bytes(facts), body)
    told = orjson.dumps(said)
    connection.sendall(HEAD.pack(len(told), len(opening)) + told)
    connection.sendall(opening)
    return True


def main() -> None:
    """Serve until the gateway is gone."""
    # Signals of a terminal reach the whole group; what is being read is still wanted while the gateway drains.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(_NICENESS)
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold somebody's prompt
    gc.disable()  # JSON makes no cycles
    with socket.socket(fileno=0) as connection:
        try:
            while _serve_one(connection):
                gc.collect()
        except ConnectionError:
            sys.exit(0)


if __name__ == "__main__":
    main()
