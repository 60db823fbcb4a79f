"""haproxy and nginx as people put them before the gateway, and what an odd request does to the clients that come after it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rows import CRLF, Row
from .wire import Wire

CLIENTS_AFTER = 10
# How long an odd request may go without an answer: a front may wait for more of it.
ODD_TIMEOUT_S = 0.25
# And how long the gateway may take to see its head: fronts keep some to themselves.
BEGUN_TIMEOUT_S = 0.05
START_TIMEOUT_S = 10.0

# Its defaults, but for waiting: what it waits for does not come. And connections to the gateway shared at once.
_HAPROXY = """
global
    maxconn 200
defaults
    mode http
    timeout connect 2s
    timeout client 2s
    timeout server 2s
    http-reuse always
frontend in
    bind 127.0.0.1:{port}
    default_backend gateway
backend gateway
    server gateway 127.0.0.1:{gateway}
"""
# The configuration for websockets that everybody copies, with connections to the gateway kept.
_NGINX = """
daemon off;
worker_processes 1;
pid {home}/nginx.pid;
error_log {home}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    proxy_read_timeout 2s;
    map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}
    upstream gateway {{ server 127.0.0.1:{gateway}; keepalive 8; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://gateway;
            proxy_http_version 1.1;
            proxy_request_buffering {buffering};
            proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Front:
    """One kind of front."""

    name: str
    program: str
    configuration: str
    options: tuple[str, ...]
    buffering: str = "on"

    @property
    def path(self) -> str | None:
        """Where the program is; None where it is not installed."""
        return shutil.which(self.program, path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")


FRONTS = (
    Front("haproxy", "haproxy", _HAPROXY, ("-db", "-f")),
    Front("nginx", "nginx", _NGINX, ("-c",)),
    Front("nginx without buffers", "nginx", _NGINX, ("-c",), buffering="off"),
)


@contextlib.asynccontextmanager
async def running(front: Front, gateway_port: int, home: Path) -> AsyncIterator[int]:
    """The front before the gateway; its port."""
    port = _free_port()
    file = home / "front.conf"
    file.write_text(front.configuration.format(port=port, gateway=gateway_port, home=home, buffering=front.buffering))
    log = (home / "front.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        str(front.path), *front.options, str(file), stdout=log, stderr=asyncio.subprocess.STDOUT
    )
    try:
        await _until_it_listens(port, process)
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        log.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _until_it_listens(port: int, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(START_TIMEOUT_S):
        while process.returncode is None:
            with contextlib.suppress(OSError):
                (await Wire.to(port)).close()
                return
            await asyncio.sleep(0.05)
    raise RuntimeError(f"the front ended with {process.returncode}")


class Seen:
    """An ASGI application that notes the paths that another one is asked for."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.paths: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.paths.append(scope["path"])
        await self._app(scope, receive, send)


async def wrong_after(row: Row, port: int, key: str, seen: Seen, *, head_first: bool) -> list[str]:
    """Send an odd request through a front; which of the clients after it did not get what they asked for.

    With `head_first` the body follows when the gateway has begun with the request: a parser that stopped behind the
    head then reads the body as something new.
    """
    wire = await Wire.to(port)
    head, separator, rest = row.sent.partition(CRLF * 2)
    if head_first:
        begun = len(seen.paths)
        await wire.send(head + separator)
        await _until_begun(seen, begun)
        await wire.send(rest)
    else:
        await wire.send(row.sent)
    with contextlib.suppress(TimeoutError, ValueError):
        for _ in row.statuses or (0,):
            if await wire.answer(is_head=row.is_head, timeout_s=ODD_TIMEOUT_S) is None:
                break
    found = [await _wrong_client(f"clean-{number}", port, key) for number in range(CLIENTS_AFTER)]
    wire.close()
    return [f"{row.label}: {wrong}" for wrong in found if wrong]


async def _until_begun(seen: Seen, before: int) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BEGUN_TIMEOUT_S):
            while len(seen.paths) == before:
                await asyncio.sleep(0.001)


async def _wrong_client(name: str, port: int, key: str) -> str | None:
    wire = await Wire.to(port)
    try:
        await wire.send(f"GET /v1/models/{name} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n\r\n".encode())
        answer = await wire.answer(timeout_s=5)
    except TimeoutError:
        return f"{name} got no answer"
    finally:
        wire.close()
    if answer is not None and answer.status == 404 and f"'{name}'".encode() in answer.body:
        return None
    return f"{name} got {answer}"
