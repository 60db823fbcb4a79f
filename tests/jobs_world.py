"""Everything that jobs need, on a real SQLite file, with programs that stand in for the trainer and the evaluator."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import insert, select, update

from gateway import tables
from gateway.database import DEFAULT_PROJECT, Database
from gateway.datasets.store import FileStore
from gateway.ids import new_id, now
from gateway.jobs.local import Jobs, LocalJobs
from gateway.jobs.models import Job, JobKind
from gateway.jobs.reconciler import JobReconciler
from gateway.jobs.service import JobService
from gateway.jobs.store import JobStore
from gateway.jobs.suites import Suites
from gateway.keys import Keys, Principal
from gateway.migrations.run import migrate
from gateway.processes import ProcessTable, home_marker
from gateway.registry.base_family import BaseFamily
from gateway.registry.models import AdapterVersion, VersionState
from gateway.registry.service import Registry
from gateway.settings import BaseModelSettings, EngineSettings, JobSettings, Settings
from tests.corpus import make_base, make_bundle
from tests.files import put_text

PRINCIPAL = Principal("key-1", "tester", DEFAULT_PROJECT, frozenset({"train"}))
STRANGER = Principal("key-2", "stranger", "proj_other", frozenset({"train", "admin"}))
PROGRAM = Path(__file__).parent / "fakes" / "job.py"
FINISH: dict[str, Any] = {"do": "finish"}


@dataclass
class World:
    """A home with its services; `orders` tells the programs what to do."""

    settings: Settings
    database: Database
    base: BaseFamily
    registry: Registry
    keys: Keys
    files: FileStore
    suites: Suites
    service: JobService
    orders: Path
    bundle: Path

    @property
    def store(self) -> JobStore:
        return JobStore(self.database)

    def order(self, kind: JobKind, *orders: dict[str, Any]) -> None:
        """What the attempts of such jobs will do."""
        filled = [{"bundle": str(self.bundle), **order} for order in orders]
        put_text(self.orders / f"{kind}.json", json.dumps(filled))

    def processes(self) -> ProcessTable:
        """A controller's own view of its children."""
        return ProcessTable(self.database, home_marker(self.settings.home))

    def reconciler(self, *, driver: Jobs | None = None, processes: ProcessTable | None = None) -> JobReconciler:
        """A fresh controller's part."""
        table = processes or self.processes()
        return JobReconciler(
            self.database,
            self.settings,
            table,
            self.registry,
            self.keys,
            self.suites,
            programs={kind: (sys.executable, str(PROGRAM), str(self.orders), kind) for kind in JobKind},
            driver=driver or LocalJobs(table, grace_s=0.3),
            retry_delay_s=0.01,
        )

    def seen(self, job: Job, attempt: int = 1) -> dict[str, Any]:
        """What a program saw of the world when it started."""
        found = json.loads((self.orders / f"seen-{job.id}-{attempt}.json").read_text())
        assert isinstance(found, dict)
        return found

    def has_started(self, job: Job, attempt: int = 1) -> bool:
        return (self.orders / f"seen-{job.id}-{attempt}.json").exists()

    def attempt_dir(self, job: Job, attempt: int = 1) -> Path:
        return self.settings.jobs_dir / job.id / str(attempt)

    async def upload(self, rows: Iterable[Any] | None = None, *, name: str = "train.jsonl") -> str:
        """A data file; good rows unless others are given."""
        lines = [json.dumps(row).encode() + b"\n" for row in (chat_rows(20) if rows is None else rows)]

        async def stream() -> AsyncIterator[bytes]:
            for line in lines:
                yield line

        file = await self.files.create(
            stream(), filename=name, purpose="fine-tune", actor="key:tester", project_id=DEFAULT_PROJECT
        )
        return file.id

    async def fine_tuning(self, **options: Any) -> Job:
        """A new fine-tuning job."""
        filled = {"model": self.base.name, "suffix": "support"} | options
        if "training_file" not in filled:
            filled["training_file"] = await self.upload()
        job, _ = await self.service.create_fine_tuning(principal=PRINCIPAL, **filled)
        return job

    async def published(self, *, seed: int = 7, state: VersionState = VersionState.VERIFIED) -> AdapterVersion:
        """A version, in the state that is asked for."""
        folder = make_bundle(self.orders / f"bundle-{seed}", self.base, seed=seed)
        version, _ = await self.registry.publish("support", folder, actor="key:tester", project_id=DEFAULT_PROJECT)
        if state is not VersionState.RECEIVED:
            code = None if state is VersionState.VERIFIED else "why"
            version = await self.registry.set_state(version.id, state, code=code, reason=code, actor="test")
        return version

    async def add_replica(self, *, state: str = "ready", replica_id: str = "engine-1") -> None:
        """An engine, as its supervisor would have written it."""
        async with self.database.write() as connection:
            row = {
                "id": replica_id,
                "state": state,
                "socket": "/nowhere",
                "epoch": "e1",
                "self_test": "passed",
                "revision": 1,
            }
            await connection.execute(insert(tables.replicas).values(**row))

    async def set_residency(
        self, version: AdapterVersion, state: str, *, replica_id: str = "engine-1", **why: str
    ) -> None:
        """A version on that engine."""
        table = tables.residency
        async with self.database.write() as connection:
            where = (table.c.replica_id == replica_id) & (table.c.engine_name == version.engine_name)
            moved = await connection.execute(update(table).where(where).values(state=state, **why))
            if moved.rowcount == 0:
                row = {
                    "replica_id": replica_id,
                    "engine_name": version.engine_name,
                    "state": state,
                    "updated_at": now(),
                }
                await connection.execute(insert(table).values(**row, **why))

    async def rows(self, table: Any) -> list[dict[str, Any]]:
        async with self.database.read() as connection:
            return [dict(row._mapping) for row in await connection.execute(select(table))]

    async def job(self, job: Job | str) -> Job:
        return await self.store.get(job if isinstance(job, str) else job.id)

    async def messages(self, job: Job) -> list[str]:
        return [event.message for event in await self.store.events(job.id, limit=1_000, newest_first=False)]


def chat_rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Rows without a fault."""
    return [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(start, start + count)
    ]


@asynccontextmanager
async def a_world(home: Path, *, engine: bool = False, **jobs: Any) -> AsyncIterator[World]:
    """A home that nobody used before; every process that it started is gone at the end."""
    orders = home.with_name(f"{home.name}-orders")
    orders.mkdir()
    base = make_base(orders / "base")
    settings = Settings(
        home=home,
        base_model=BaseModelSettings(name=base.name, path=base.path),
        engine=EngineSettings(enabled=engine),
        jobs=JobSettings(**({"threads": 1} | jobs)),
    )
    settings.prepare_directories()
    await migrate(settings)
    async with opened_world(settings, base, orders) as world:
        for kind in JobKind:
            world.order(kind, FINISH)
        try:
            yield world
        finally:
            (orders / "release").touch()
            await world.processes().stop_all(grace_s=0.1)


@asynccontextmanager
async def opened_world(settings: Settings, base: BaseFamily, orders: Path) -> AsyncIterator[World]:
    """The same home again, as another process would open it."""
    database = Database(settings.database)
    registry = Registry(database, settings, base)
    files, suites = FileStore(database, settings), Suites(settings, shipped=orders / "suites")
    bundle = orders / "bundle"
    if not bundle.exists():
        make_bundle(bundle, base)
    folder = orders / "suites" / "emails"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text("name: emails\n")
    try:
        yield World(
            settings=settings,
            database=database,
            base=base,
            registry=registry,
            keys=Keys(database, b"p" * 32),
            files=files,
            suites=suites,
            service=JobService(database, settings, registry, files, suites),
            orders=orders,
            bundle=bundle,
        )
    finally:
        await database.close()


async def tick_until(
    reconciler: JobReconciler, done: Callable[[], Awaitable[bool]], *, timeout_s: float = 30, what: str = "it"
) -> None:
    """Run the controller's loop until something is so."""
    deadline = time.monotonic() + timeout_s
    while not await done():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen within {timeout_s:.0f} s")
        await reconciler.tick()
        await asyncio.sleep(0.01)


async def run_to_end(world: World, reconciler: JobReconciler, job: Job, *, timeout_s: float = 30) -> Job:
    """Tick until the job is final."""

    async def done() -> bool:
        return (await world.job(job)).state.is_final

    await tick_until(reconciler, done, timeout_s=timeout_s, what=f"the end of {job.id}")
    return await world.job(job)


async def add_job(world: World, job: Job) -> Job:
    """A job put into the database as it is."""
    async with world.database.write() as connection:
        assert await world.store.insert(connection, job)
    return job


__all__ = [
    "FINISH",
    "PRINCIPAL",
    "STRANGER",
    "World",
    "a_world",
    "add_job",
    "chat_rows",
    "new_id",
    "opened_world",
    "run_to_end",
    "tick_until",
]
