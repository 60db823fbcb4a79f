"""Publishing on a real database and a real disk."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.database import DEFAULT_PROJECT, Database, read_revision
from gateway.errors import Conflict, GatewayError, Invalid, NotFound, Refused, StorageFull, Unavailable
from gateway.migrations.run import migrate
from gateway.registry import service
from gateway.registry.artifacts import Artifacts
from gateway.registry.base_family import BaseFamily
from gateway.registry.manifest import CONFIG_FILE, WEIGHTS_FILE, Manifest
from gateway.registry.models import AdapterVersion, VersionState
from gateway.registry.preflight import preflight
from gateway.registry.service import Registry
from gateway.settings import Limits, Settings
from gateway.tables import audit
from tests.corpus import BAD, make_adapter, make_base, make_bundle


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFamily:
    return make_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path / "home")
    settings.prepare_directories()
    return settings


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    await migrate(settings)
    database = Database(settings.database)
    yield database
    await database.close()


@pytest.fixture
def registry(database: Database, settings: Settings, base: BaseFamily) -> Registry:
    return Registry(database, settings, base)


@pytest.fixture
def folder(tmp_path: Path, base: BaseFamily) -> Path:
    return make_bundle(tmp_path / "bundle", base)


async def publish(
    registry: Registry, source: Path, adapter: str = "support", **options: str
) -> tuple[AdapterVersion, bool]:
    return await registry.publish(adapter, source, actor="key:test", project_id=DEFAULT_PROJECT, **options)


async def rows_of_audit(database: Database) -> list[tuple[str, str]]:
    async with database.read() as connection:
        found = await connection.execute(select(audit.c.action, audit.c.subject).order_by(audit.c.id))
        return [(row.action, row.subject) for row in found]


def staged(settings: Settings) -> list[Path]:
    return list((settings.artifacts_dir / ".staging").glob("*"))


async def test_a_published_version_is_on_disk_in_the_database_and_in_the_audit_log(
    registry: Registry, database: Database, settings: Settings, folder: Path, base: BaseFamily
) -> None:
    version, created = await publish(registry, folder)

    directory = registry.directory(version)
    assert created
    assert (version.name, version.state, version.base_digest) == ("support@1", VersionState.RECEIVED, base.digest)
    assert directory == settings.artifacts_dir / version.digest[:2] / version.digest
    assert {path.name for path in directory.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
    assert (directory / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()
    assert [path.stat().st_mode & 0o777 for path in (directory, directory / CONFIG_FILE, directory / WEIGHTS_FILE)] == [
        0o555,
        0o444,
        0o444,
    ]
    assert str(settings.home) not in (directory / CONFIG_FILE).read_text()
    assert await rows_of_audit(database) == [("version.publish", "support@1")]
    assert await registry.version("support@1") == version
    assert (await registry.adapter("support")).versions == (version,)
    assert staged(settings) == []
    registry.verify_files(version)


async def test_publishing_the_same_again_is_the_same_version(
    registry: Registry, database: Database, folder: Path
) -> None:
    first, _ = await publish(registry, folder)

    again, created = await publish(registry, folder)

    assert (again, created) == (first, False)
    assert await rows_of_audit(database) == [("version.publish", "support@1")]


async def test_the_published_bundle_published_again_is_the_same_version(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    first, _ = await publish(registry, folder)
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (fetched / name).write_bytes((registry.directory(first) / name).read_bytes())
    (fetched / "manifest.json").write_text(registry.manifest(first).model_dump_json())

    assert await publish(registry, fetched) == (first, False)


async def test_the_same_weights_with_another_history_are_a_conflict(
    registry: Registry, folder: Path, tmp_path: Path, base: BaseFamily
) -> None:
    await publish(registry, folder)
    make_bundle(tmp_path / "other", base, note="another history")

    with pytest.raises(Conflict, match="support@1") as caught:
        await publish(registry, tmp_path / "other")

    assert caught.value.code == "manifest_conflict"
    assert [version.name for version in await registry.versions()] == ["support@1"]


async def test_a_folder_that_claims_no_history_does_not_conflict(
    registry: Registry, folder: Path, tmp_path: Path, base: BaseFamily
) -> None:
    first, _ = await publish(registry, folder)
    make_adapter(tmp_path / "plain", base)

    assert await publish(registry, tmp_path / "plain") == (first, False)


async def test_another_adapter_may_share_the_files(registry: Registry, folder: Path) -> None:
    first, _ = await publish(registry, folder)

    second, created = await publish(registry, folder, "billing")

    assert created
    assert (second.name, second.digest) == ("billing@1", first.digest)
    assert registry.directory(second) == registry.directory(first)
    assert registry.manifest(second).adapter == "billing"


async def test_numbers_count_from_one_in_each_adapter(registry: Registry, tmp_path: Path, base: BaseFamily) -> None:
    names = []
    for seed, adapter in enumerate(["a", "b", "a", "b", "a"]):
        version, _ = await publish(registry, make_adapter(tmp_path / str(seed), base, seed=seed), adapter)
        names.append(version.name)

    assert names == ["a@1", "b@1", "a@2", "b@2", "a@3"]
    assert [adapter.name for adapter in await registry.adapters()] == ["a", "b"]
    assert [version.name for version in (await registry.adapters())[0].versions] == ["a@1", "a@2", "a@3"]


async def test_a_plain_folder_gets_a_manifest_that_invents_nothing(
    registry: Registry, tmp_path: Path, base: BaseFamily
) -> None:
    version, _ = await publish(registry, make_adapter(tmp_path / "plain", base))

    manifest = registry.manifest(version)

    assert manifest == Manifest(
        adapter="support",
        base_model="tiny",
        rank=8,
        alpha=16,
        target_modules=("q_proj", "v_proj"),
        files=manifest.files,
    )
    assert set(manifest.files) == {CONFIG_FILE, WEIGHTS_FILE}


async def test_a_bundles_manifest_is_kept_with_the_published_files_digests(registry: Registry, folder: Path) -> None:
    version, _ = await publish(registry, folder)

    manifest = registry.manifest(version)

    assert (manifest.recipe["name"], manifest.datasets[0].rows, manifest.metrics) == ("sft", 800, {"loss": 0.25})
    config = (registry.directory(version) / CONFIG_FILE).read_bytes()
    assert manifest.files[CONFIG_FILE] == hashlib.sha256(config).hexdigest()


async def test_parent_and_job_are_recorded(registry: Registry, folder: Path) -> None:
    version, _ = await publish(registry, folder, parent="other@4", job_id="ftjob-1")

    assert (version.parent, version.job_id, registry.manifest(version).parent) == ("other@4", "ftjob-1", "other@4")
    assert await registry.version("support@1") == version


@pytest.mark.parametrize("name", ["", "Support", "-a", "a/../b", "../a", "a" * 49, "a\n", "a b", "a@1", "é", "tiny"])
async def test_a_bad_name_is_refused_before_anything_is_read(registry: Registry, tmp_path: Path, name: str) -> None:
    with pytest.raises(Invalid) as caught:
        await publish(registry, tmp_path / "not there", name)

    assert caught.value.code in ("bad_name", "name_taken")


async def test_another_projects_name_is_taken(registry: Registry, folder: Path) -> None:
    await publish(registry, folder)

    with pytest.raises(Conflict) as caught:
        await registry.publish("support", folder, actor="key:other", project_id="proj_other")

    assert caught.value.code == "name_taken"


@pytest.mark.invariant(4)
@pytest.mark.parametrize("kind", sorted(name for name, bad in BAD.items() if bad.refused_by == "preflight"))
async def test_a_bad_adapter_leaves_nothing_behind(
    registry: Registry, database: Database, settings: Settings, base: BaseFamily, tmp_path: Path, kind: str
) -> None:
    BAD[kind].build(tmp_path / "bad", base)

    with pytest.raises(Refused) as caught:
        await publish(registry, tmp_path / "bad")

    assert caught.value.code == BAD[kind].code
    assert await registry.versions() == []
    assert await rows_of_audit(database) == []
    assert [path for path in settings.artifacts_dir.rglob("*") if path.is_file()] == []
    assert list(settings.manifests_dir.iterdir()) == []


@pytest.mark.mutant(4)
async def test_mutant_without_preflights_checks_a_nan_adapter_is_published(
    registry: Registry, base: BaseFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BAD["all_nan"].build(tmp_path / "bad", base)
    monkeypatch.setattr("gateway.registry.preflight._check_values", lambda descriptor, modules: None)

    _, created = await publish(registry, tmp_path / "bad")

    assert created


async def test_only_the_known_files_are_copied_and_links_are_not_followed(
    registry: Registry, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    (folder / "checkpoint-5").mkdir()
    (folder / "training_args.bin").write_bytes(b"a pickle")
    os.mkfifo(folder / "pipe")

    version, _ = await publish(registry, folder)

    assert {path.name for path in registry.directory(version).iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


async def test_uploads_have_caps(database: Database, settings: Settings, base: BaseFamily, folder: Path) -> None:
    small = settings.model_copy(update={"limits": Limits(adapter_bytes=1024)})

    with pytest.raises(Refused) as caught:
        await publish(Registry(database, small, base), folder)

    assert caught.value.code == "too_large"


async def test_a_source_that_changes_after_the_copy_changes_nothing(
    registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = preflight

    def slow(*arguments: Any, **options: Any) -> object:
        (folder / WEIGHTS_FILE).write_bytes(b"swapped after it was copied")
        return original(*arguments, **options)

    monkeypatch.setattr(service, "preflight", slow)

    version, _ = await publish(registry, folder)

    registry.verify_files(version)


# ---- Concurrency ---------------------------------------------------------------------------------------------------


async def test_twenty_publishes_of_the_same_bundle_make_one_version(
    registry: Registry, database: Database, settings: Settings, folder: Path
) -> None:
    results = await asyncio.gather(*(publish(registry, folder) for _ in range(20)))

    assert sorted(created for _, created in results) == [False] * 19 + [True]
    assert {version.name for version, _ in results} == {"support@1"}
    assert len(await rows_of_audit(database)) == 1
    assert staged(settings) == []
    registry.verify_files(results[0][0])


async def test_twenty_publishes_of_different_bundles_get_twenty_numbers(
    registry: Registry, database: Database, settings: Settings, base: BaseFamily, tmp_path: Path
) -> None:
    other_process = Database(settings.database)
    second = Registry(other_process, settings, base)
    sources = [make_adapter(tmp_path / str(seed), base, seed=seed) for seed in range(20)]

    results = await asyncio.gather(
        *(publish((registry, second)[seed % 2], source) for seed, source in enumerate(sources))
    )
    await other_process.close()

    assert sorted(version.version for version, _ in results) == list(range(1, 21))
    assert all(created for _, created in results)
    assert len(await registry.versions()) == 20


# ---- Callbacks and revision ----------------------------------------------------------------------------------------


async def test_callbacks_run_in_the_same_transaction(
    database: Database, settings: Settings, base: BaseFamily, folder: Path
) -> None:
    seen = []

    async def fails_once(connection: AsyncConnection, version: AdapterVersion) -> None:
        seen.append(version.name)
        if len(seen) == 1:
            raise Unavailable("not now")

    registry = Registry(database, settings, base, on_publish=[fails_once])
    with pytest.raises(Unavailable):
        await publish(registry, folder)
    assert await registry.versions() == []

    version, created = await publish(registry, folder)

    assert (version.name, created, seen) == ("support@1", True, ["support@1", "support@1"])
    await publish(registry, folder)
    assert len(seen) == 2


async def test_every_change_moves_the_revision_and_nothing_else_does(
    registry: Registry, database: Database, folder: Path
) -> None:
    async def revision() -> int:
        async with database.read() as connection:
            return await read_revision(connection)

    version, _ = await publish(registry, folder)
    assert await revision() == 1
    await publish(registry, folder)
    assert await revision() == 1
    await registry.set_state(version.id, VersionState.VERIFIED, code=None, reason=None, actor="controller")
    assert await revision() == 2


# ---- States --------------------------------------------------------------------------------------------------------


async def test_a_version_moves_forward_only(registry: Registry, database: Database, folder: Path) -> None:
    version, _ = await publish(registry, folder)

    await registry.set_state(version.id, VersionState.VERIFIED, code=None, reason=None, actor="controller")
    moved = await registry.set_state(
        version.id, VersionState.QUARANTINED, code="parity", reason="far off", actor="controller"
    )

    assert (moved.state, moved.state_code, moved.state_reason) == (VersionState.QUARANTINED, "parity", "far off")
    assert await registry.version("support@1") == moved
    for state in (VersionState.RECEIVED, VersionState.VERIFIED, VersionState.REJECTED):
        with pytest.raises(Conflict) as caught:
            await registry.set_state(version.id, state, code="x", reason=None, actor="controller")
        assert caught.value.code == "state_final"
    assert [action for action, _ in await rows_of_audit(database)] == [
        "version.publish",
        "version.state",
        "version.state",
    ]


async def test_saying_a_state_twice_is_no_move(registry: Registry, database: Database, folder: Path) -> None:
    version, _ = await publish(registry, folder)

    for _ in range(2):
        await registry.set_state(version.id, VersionState.REJECTED, code="log_loss", reason="24.6", actor="controller")

    assert len(await rows_of_audit(database)) == 2
    assert [each.name for each in await registry.versions(states={VersionState.REJECTED})] == ["support@1"]
    assert await registry.versions(states={VersionState.VERIFIED}) == []


async def test_two_opposite_moves_at_once_leave_one(registry: Registry, folder: Path) -> None:
    version, _ = await publish(registry, folder)

    results = await asyncio.gather(
        registry.set_state(version.id, VersionState.VERIFIED, code=None, reason=None, actor="a"),
        registry.set_state(version.id, VersionState.REJECTED, code="x", reason=None, actor="b"),
        return_exceptions=True,
    )

    assert sum(isinstance(result, Conflict) for result in results) == 1


async def test_a_rejection_needs_its_code(registry: Registry, folder: Path) -> None:
    version, _ = await publish(registry, folder)

    with pytest.raises(Invalid):
        await registry.set_state(version.id, VersionState.REJECTED, code=None, reason="because", actor="controller")


@pytest.mark.parametrize(
    "name",
    ["support@2", "nobody@1", "support", "support@0", "support@1\n", "support@-1", "x" * 5000, "support@1@1", ""],
)
async def test_what_does_not_exist_is_not_found(registry: Registry, folder: Path, name: str) -> None:
    await publish(registry, folder)

    with pytest.raises(NotFound):
        await registry.version(name)


async def test_an_unknown_adapter_or_id_is_not_found(registry: Registry) -> None:
    with pytest.raises(NotFound):
        await registry.adapter("nobody")
    with pytest.raises(NotFound):
        await registry.set_state("ver-x", VersionState.VERIFIED, code=None, reason=None, actor="a")


# ---- Bytes that never change ---------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def damages() -> dict[str, Callable[[Path], object]]:
    return {
        "weights": lambda directory: flip(directory / WEIGHTS_FILE),
        "config": lambda directory: flip(directory / CONFIG_FILE),
        "cut": lambda directory: os.truncate(directory / WEIGHTS_FILE, 100),
        "gone": lambda directory: (directory / WEIGHTS_FILE).unlink(),
        "extra": lambda directory: (directory / "adapter_model.bin").write_bytes(b""),
        "linked": lambda directory: (directory / CONFIG_FILE).rename(directory.parent / "x") and (directory / CONFIG_FILE).symlink_to(directory.parent / "x"),
    }  # fmt: skip


@pytest.mark.invariant(1)
@pytest.mark.parametrize("damage", damages())
async def test_changed_bytes_are_found_and_publishing_again_restores_them(
    registry: Registry, settings: Settings, folder: Path, damage: str
) -> None:
    version, _ = await publish(registry, folder)
    directory = registry.directory(version)
    directory.chmod(0o755)
    damages()[damage](directory)

    with pytest.raises(Refused) as caught:
        registry.verify_files(version)
    assert caught.value.code == "digest_mismatch"

    assert await publish(registry, folder) == (version, False)
    registry.verify_files(version)
    assert staged(settings) == []


@pytest.mark.mutant(1)
async def test_mutant_without_the_digest_changed_bytes_pass(
    registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, _ = await publish(registry, folder)
    flip(registry.directory(version) / WEIGHTS_FILE)
    monkeypatch.setattr(Artifacts, "_digest_of", lambda self, directory: directory.name)

    registry.verify_files(version)


async def test_a_changed_manifest_is_found(registry: Registry, settings: Settings, folder: Path) -> None:
    version, _ = await publish(registry, folder)
    path = settings.manifests_dir / f"{version.manifest_digest}.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "another"}))

    with pytest.raises(Refused) as caught:
        registry.manifest(version)

    assert caught.value.code == "digest_mismatch"


# ---- A disk that fails ---------------------------------------------------------------------------------------------


class Failing:
    """Lets `after` calls through, then fails once with `error`."""

    def __init__(self, call: Callable[..., object], error: OSError, after: int) -> None:
        self.call, self.error, self.after, self.failed = call, error, after, False

    def __call__(self, *arguments: object, **options: object) -> object:
        self.after -= 1
        if self.after == -1:
            self.failed = True
            raise self.error
        return self.call(*arguments, **options)


async def error_of(registry: Registry, source: Path, adapter: str) -> GatewayError | None:
    try:
        await publish(registry, source, adapter)
    except GatewayError as error:
        return error
    return None


@pytest.mark.invariant(10)
@pytest.mark.parametrize("call", ["fsync", "rename", "replace", "mkdir", "chmod"])
@pytest.mark.parametrize(("number", "expected"), [(errno.EIO, Unavailable), (errno.ENOSPC, StorageFull)])
async def test_a_disk_that_fails_at_any_step_acknowledges_nothing(
    registry: Registry, settings: Settings, base: BaseFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    call: str, number: int, expected: type[GatewayError],
) -> None:  # fmt: skip
    failures = 0
    for step in range(100):
        source, adapter = make_bundle(tmp_path / f"{step}", base, seed=step), f"adapter-{step}"
        failing = Failing(getattr(os, call), OSError(number, os.strerror(number)), after=step)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            error = await error_of(registry, source, adapter)
        if error is None:
            assert not failing.failed
            break
        failures += 1
        assert type(error) is expected
        assert [version.adapter for version in await registry.versions()] == [f"adapter-{done}" for done in range(step)]
        assert staged(settings) == []
        version, created = await publish(registry, source, adapter)
        assert (version.name, created) == (f"adapter-{step}@1", True)
        registry.verify_files(version)
        registry.manifest(version)

    assert failures > 0, f"publishing never calls os.{call}"


async def test_a_start_removes_what_dead_processes_left_and_spares_the_living(
    registry: Registry, settings: Settings, folder: Path
) -> None:
    dead = settings.artifacts_dir / ".staging" / "dead"
    (dead / "sub").mkdir(parents=True)
    (dead / WEIGHTS_FILE).write_bytes(b"half")

    with registry.staging() as living:
        (living / "file").write_text("kept")
        await registry.start()
        assert (living / "file").read_text() == "kept"
        assert staged(settings) == [living]

    assert staged(settings) == []
