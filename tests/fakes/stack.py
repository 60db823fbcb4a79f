"""A real gateway on a loopback port over the fake engine on a real socket, in the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from sqlalchemy import delete, insert, select, update

from gateway import tables
from gateway.app import Gateway
from gateway.database import DEFAULT_PROJECT, Database, bump_revision
from gateway.handover import listening_socket
from gateway.ids import now
from gateway.keys import Keys, load_pepper
from gateway.lease import EXPIRE_S
from gateway.migrations.run import migrate
from gateway.proxy.cutting import Timeouts
from gateway.registry.models import AdapterVersion, VersionState
from gateway.routing.store import create_route_for
from gateway.settings import Settings, load_settings
from tests.corpus import make_base
from tests.factories import a_version

from .engine import FakeEngine

BASE = "tiny"
POLL_S = 0.01


class Stack:
    """`async with Stack(tmp_path) as stack`: settings, database, one fake engine that is READY, and the gateway."""

    def __init__(self, home: Path, *, auth: str = "keys", timeouts: Timeouts | None = None, **overrides: Any) -> None:
        if not (home / "base").exists():
            make_base(home / "base", name=BASE)
        self.settings: Settings = load_settings(
            home=home / "home",
            auth=auth,
            port=0,
            base_model={"name": BASE, "path": home / "base"},
            **{"log_level": "error", "drain_timeout_s": 5, **overrides},
        )
        self.database = Database(self.settings.database)
        # A socket's path is short, and pytest's directories are not.
        self._sockets = tempfile.TemporaryDirectory(prefix="turnout-test-")
        self.engine = FakeEngine(Path(self._sockets.name) / "engine.sock", model_name=BASE)
        self.keys: dict[str, str] = {}
        self.url = ""
        self._timeouts = timeouts
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Stack:
        await self.prepare()
        await self.serve()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        await self.engine.stop()
        await self.database.close()
        self._sockets.cleanup()

    async def prepare(self) -> None:
        """A migrated database with a ready replica and a key of each kind; the engine is up."""
        self.settings.prepare_directories()
        await migrated(self.settings)
        await self.engine.start()
        await self.add_replica("replica-1", self.engine)
        await a_living_controller(self.database)
        keys = Keys(self.database, load_pepper(self.settings))
        for name, scopes in {
            "admin": ["admin"],
            "inference": ["inference"],
            "preview": ["inference", "preview"],
            "train": ["inference", "train"],
            "evaluator": ["evaluate", "inference", "preview"],
        }.items():
            _, self.keys[name] = await keys.create(name, scopes, actor="test")

    async def serve(self) -> None:
        """Start the gateway on a free port."""
        listening = listening_socket(self.settings)
        # As uvloop does, on which the gateway runs; else each answer waits 40 ms for an acknowledgement.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self.gateway = Gateway(self.settings, timeouts=self._timeouts)
        self.server = self.gateway.server()
        self._serving = asyncio.create_task(self.server.serve(sockets=[listening]))
        await until(lambda: self.server.started or self._serving_is_over())

    def _serving_is_over(self) -> bool:
        return self._serving is not None and self._serving.done()

    async def stop(self) -> None:
        """Stop the gateway, as a second signal would."""
        if self._serving is None:
            return
        self.server.should_exit = True
        self.gateway.completions.cut_all("shutdown")
        await self._serving
        self._serving = None

    @contextlib.asynccontextmanager
    async def sibling(self) -> AsyncIterator[Stack]:
        """A second gateway over the same home and engine."""
        other = Stack(self.settings.home.parent, auth=self.settings.auth)
        other.engine, other.keys = self.engine, self.keys
        await other.serve()
        try:
            yield other
        finally:
            await other.stop()
            await other.database.close()
            other._sockets.cleanup()

    def client(self, key: str | None = "admin", **options: Any) -> httpx.AsyncClient:
        """An HTTP client with one of `keys`; None: without."""
        headers = {"authorization": f"Bearer {self.keys.get(key, key)}"} if key else {}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=20, trust_env=False, **options)

    async def add_replica(self, replica_id: str, engine: FakeEngine, *, state: str = "ready", epoch: str = "1") -> None:
        """An engine replica, as the controller records it."""
        async with self.database.write() as connection:
            await connection.execute(
                insert(tables.replicas).values(
                    id=replica_id, state=state, socket=str(engine.socket), epoch=epoch, self_test="passed",
                    revision=1, started_at=now(),
                )
            )  # fmt: skip
            await bump_revision(connection)

    async def set_replica(self, replica_id: str, **values: Any) -> None:
        """Change a replica's row."""
        async with self.database.write() as connection:
            await connection.execute(update(tables.replicas).where(tables.replicas.c.id == replica_id).values(**values))
            await bump_revision(connection)
        await self.see()

    async def add_version(
        self,
        adapter: str = "support",
        version: int = 1,
        *,
        state: VersionState = VersionState.VERIFIED,
        is_promoted: bool = False,
        is_resident: bool = True,
        **fields: Any,
    ) -> AdapterVersion:
        """A published version with its route, loaded in the engine and READY unless told otherwise."""
        digest = sha256(f"{adapter}@{version}".encode()).hexdigest()
        made = a_version(
            adapter=adapter, version=version, digest=digest, state=state, id=f"ver-{adapter}-{version}",
            base_model=BASE, promoted_at=now() if is_promoted else None, **fields,
        )  # fmt: skip
        async with self.database.write() as connection:
            await connection.execute(insert(tables.adapter_versions).values(**made.model_dump(mode="python")))
            await create_route_for(connection, made)
            await bump_revision(connection)
        if is_resident:
            await self.load(made)
        await self.see()
        return made

    async def load(self, version: AdapterVersion, replica_id: str = "replica-1") -> None:
        """Make a version READY on a replica."""
        self.engine.load_named(version.engine_name)
        async with self.database.write() as connection:
            await connection.execute(
                insert(tables.residency).values(
                    replica_id=replica_id, engine_name=version.engine_name, state="ready", updated_at=now()
                )
            )
            await bump_revision(connection)
        await self.see()

    async def unload(self, version: AdapterVersion, replica_id: str = "replica-1") -> None:
        """Take a version off a replica."""
        self.engine.adapters.pop(version.engine_name, None)
        table = tables.residency
        async with self.database.write() as connection:
            await connection.execute(
                delete(table).where(table.c.replica_id == replica_id, table.c.engine_name == version.engine_name)
            )
            await bump_revision(connection)
        await self.see()

    async def set_route(self, name: str, **values: Any) -> None:
        """Change a route's row, past every check."""
        table = tables.routes
        async with self.database.write() as connection:
            await connection.execute(
                update(table).where(table.c.name == name).values(revision=table.c.revision + 1, **values)
            )
            await bump_revision(connection)
        await self.see()

    async def add_verdict(self, version: AdapterVersion, suite: str, verdict: str, **values: Any) -> None:
        """A verdict for a version's digest."""
        row: dict[str, Any] = {
            "id": f"verdict-{version.digest[:8]}-{suite}-{verdict}", "project_id": DEFAULT_PROJECT, "created_at": now(),
            "created_by": "test", "digest": version.digest, "suite": suite, "suite_digest": "d" * 64,
            "fingerprint": "f" * 64, "baseline": version.base_digest, "verdict": verdict, "reason": "test",
            "job_id": "job-1", "looks": 1,
        }  # fmt: skip
        async with self.database.write() as connection:
            await connection.execute(insert(tables.verdicts).values(**{**row, **values}))

    async def see(self) -> None:
        """Let the gateway, where there is one, see what was written."""
        if self._serving is not None:
            await self.gateway.table.refresh()

    async def rows(self, table: Any) -> list[Any]:
        """Everything in a table."""
        async with self.database.read() as connection:
            return list((await connection.execute(select(table))).all())


async def a_living_controller(database: Database, *, silent_s: float = -86_400.0) -> None:
    """A controller's lease, renewed so long ago; by default it is good for a day."""
    table = tables.leases
    async with database.write() as connection:
        await connection.execute(delete(table))
        until = now() + timedelta(seconds=EXPIRE_S - silent_s)
        await connection.execute(insert(table).values(name="controller", holder="test", epoch=1, expires_at=until))


_schema: list[bytes] = []


async def migrated(settings: Settings) -> None:
    """A database of the present schema; migrated once, copied afterwards."""
    file = settings.home / "turnout.db"
    if _schema:
        file.write_bytes(_schema[0])
        return
    await migrate(settings)
    _schema.append(file.read_bytes())


async def until(condition: Callable[[], bool], *, timeout_s: float = 10) -> None:
    """Wait for a condition; a test that would wait for ever fails."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(POLL_S)


def events_of(content: bytes) -> list[bytes]:
    """The payloads of server-sent events."""
    return [event[6:] for event in content.split(b"\n\n") if event.startswith(b"data: ")]


def chat_body(text: str = "hello", *, model: str = BASE, **fields: Any) -> dict[str, Any]:
    """A chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **fields}


async def first_events(response: httpx.Response, count: int) -> list[bytes]:
    """The first events of a stream that goes on."""
    found: list[bytes] = []
    content = b""
    async for part in response.aiter_raw():
        content += part
        found = events_of(content)
        if len(found) >= count:
            break
    return found
