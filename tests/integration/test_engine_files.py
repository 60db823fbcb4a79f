"""Files of versions that cannot be read: what an engine that fills up does about them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import pytest
from sqlalchemy import insert, select, update

from gateway import tables
from gateway.database import DEFAULT_PROJECT, Database
from gateway.engine import reconciler as module
from gateway.engine.admin import EngineAdmin
from gateway.engine.models import Wanted
from gateway.engine.probe import Prober
from gateway.engine.reconciler import MAX_UNREADABLE, Converger, LoadLedger, Session, StaleEpoch
from gateway.errors import Conflict, Unavailable
from gateway.ids import now
from gateway.registry.manifest import WEIGHTS_FILE
from gateway.registry.models import AdapterVersion, VersionState
from gateway.registry.service import Registry
from gateway.settings import Settings
from tests.corpus import make_adapter, make_base
from tests.fakes.engine import FakeEngine, fake_reference
from tests.registry_world import a_database, a_home


@dataclass
class Replica:
    """A converger over an engine in this process."""

    engine: FakeEngine
    converger: Converger
    session: Session
    database: Database
    settings: Settings
    registry: Registry
    sources: Path

    async def verified(self, seed: int) -> AdapterVersion:
        """A version that the engine should hold."""
        folder = make_adapter(self.sources / str(seed), self.registry.base, seed=seed)
        version, _ = await self.registry.publish("support", folder, actor="key:test", project_id=DEFAULT_PROJECT)
        reference = fake_reference(self.registry.directory(version)) | {"digest": version.digest}
        (self.settings.references_dir / f"{version.digest}.json").write_text(json.dumps(reference))
        return await self.registry.set_state(version.id, VersionState.VERIFIED, code=None, reason=None, actor="test")

    async def states(self) -> dict[str, str]:
        """Residency by the version's name in engines."""
        table = tables.residency
        async with self.database.read() as connection:
            return {row.engine_name: row.state for row in await connection.execute(select(table))}

    async def converge(self) -> None:
        """Until there is nothing to do."""
        while not (await self.converger.converge(self.session)).is_done:
            pass


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[Replica]:
    base = make_base(tmp_path / "base")
    settings = a_home(tmp_path / "home")
    socket = settings.run_dir / "engine-0.sock"
    async with a_database(settings) as database, FakeEngine(socket, model_name=base.name) as engine:
        row = {"id": "engine-0", "state": "testing", "socket": str(socket), "epoch": "e", "self_test": "passed"}
        async with database.write() as connection:
            await connection.execute(insert(tables.replicas).values(**row, revision=0))
        registry = Registry(database, settings, base)
        admin = EngineAdmin(str(socket), base.name)
        ledger = LoadLedger(settings.run_dir / "engine-0.loads", "e")
        session = Session("engine-0", "e", admin, Prober(admin), ledger)
        try:
            yield Replica(
                engine, Converger(database, settings, registry), session, database, settings, registry, tmp_path
            )
        finally:
            await admin.close()


def unreadable(times: Iterator[object], name: str) -> Callable[[Registry, AdapterVersion], None]:
    """In place of `Registry.verify_files`: the disk does not answer for one version, so many times."""

    def verify_files(self: Registry, version: AdapterVersion) -> None:
        if version.name == name and next(times, None) is not None:
            raise Unavailable("the files cannot be read now", code="storage_failed")

    return verify_files


async def test_a_disk_that_does_not_answer_once_is_asked_again_before_all_else(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await replica.verified(1)
    monkeypatch.setattr(Registry, "verify_files", unreadable(repeat(True, 1), one.name))

    with pytest.raises(Unavailable):
        await replica.converge()
    await replica.converge()

    assert await replica.states() == {one.engine_name: "ready"}
    assert (await replica.registry.version(one.name)).state is VersionState.VERIFIED


async def test_a_disk_that_goes_on_not_answering_holds_up_no_other_version(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, silent = await replica.verified(1), await replica.verified(2)  # the newest is loaded first
    times = repeat(True)
    monkeypatch.setattr(Registry, "verify_files", unreadable(times, silent.name))
    monkeypatch.setattr(module, "FIRST_LOOK_S", 3600.0)
    monkeypatch.setattr(module, "LATEST_LOOK_S", 3600.0)

    for _ in range(MAX_UNREADABLE - 1):
        with pytest.raises(Unavailable):
            await replica.converge()
    await replica.converge()

    assert await replica.states() == {other.engine_name: "ready"}
    assert (await replica.registry.version(silent.name)).state is VersionState.VERIFIED


async def test_it_is_loaded_when_the_disk_answers_again(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = await replica.verified(1)
    monkeypatch.setattr(Registry, "verify_files", unreadable(repeat(True, MAX_UNREADABLE), silent.name))
    monkeypatch.setattr(module, "FIRST_LOOK_S", 0.0)

    for _ in range(MAX_UNREADABLE - 1):
        with pytest.raises(Unavailable):
            await replica.converge()
    await replica.converge()

    assert await replica.states() == {silent.engine_name: "ready"}


# ---- What must hold at the moment of a load


async def test_files_are_hashed_before_a_load_and_damaged_ones_reach_no_engine(replica: Replica) -> None:
    damaged, whole = await replica.verified(1), await replica.verified(2)
    weights = replica.registry.directory(damaged) / WEIGHTS_FILE
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")

    await replica.converge()

    assert await replica.states() == {damaged.engine_name: "refused", whole.engine_name: "ready"}
    assert set(replica.engine.adapters) == {whole.engine_name}


async def test_a_reference_of_other_weights_is_compared_with_nothing(replica: Replica) -> None:
    one, other = await replica.verified(1), await replica.verified(2)
    references = replica.settings.references_dir
    (references / f"{one.digest}.json").write_bytes((references / f"{other.digest}.json").read_bytes())

    await replica.converge()

    assert await replica.states() == {one.engine_name: "refused", other.engine_name: "ready"}
    assert set(replica.engine.adapters) == {other.engine_name}


async def test_what_was_seen_of_an_engine_that_is_gone_marks_nothing_of_its_successor(replica: Replica) -> None:
    await replica.verified(1)
    async with replica.database.write() as connection:
        await connection.execute(update(tables.replicas).values(epoch="its successor"))

    with pytest.raises(StaleEpoch):
        await replica.converge()

    assert await replica.states() == {}
    assert replica.engine.adapters == {}


@pytest.mark.parametrize("fate", [{"state": "quarantined"}, {"retired_at": now()}])
async def test_what_was_condemned_or_retired_a_moment_ago_is_not_loaded(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, fate: dict[str, object]
) -> None:
    """Between the look that wanted it and the load lies the hashing of its files."""
    await replica.verified(1)
    real = Converger._load

    async def overtaken(self: Converger, session: Session, one: Wanted) -> None:
        async with replica.database.write() as connection:
            await connection.execute(update(tables.adapter_versions).values(**fate))
        await real(self, session, one)

    monkeypatch.setattr(Converger, "_load", overtaken)

    with pytest.raises(Conflict) as caught:
        await replica.converge()

    assert caught.value.code == "not_servable"
    assert replica.engine.adapters == {}
