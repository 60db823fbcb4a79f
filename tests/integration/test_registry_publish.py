"""Publishing on a real database and a real disk."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.database import Database, read_revision
from gateway.errors import Conflict, Invalid, Refused, Unavailable
from gateway.registry import service
from gateway.registry.base_family import BaseFamily
from gateway.registry.manifest import CONFIG_FILE, WEIGHTS_FILE, Manifest
from gateway.registry.models import AdapterVersion, VersionState
from gateway.registry.preflight import preflight
from gateway.registry.service import Registry
from gateway.settings import Limits, Settings
from tests.corpus import BAD, make_adapter, make_base, make_bundle
from tests.files import note_fsync
from tests.registry_world import a_database, a_home, publish, rows_of_audit, staged


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFamily:
    return make_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return a_home(tmp_path / "home")


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    async with a_database(settings) as database:
        yield database


@pytest.fixture
def registry(database: Database, settings: Settings, base: BaseFamily) -> Registry:
    return Registry(database, settings, base)


@pytest.fixture
def folder(tmp_path: Path, base: BaseFamily) -> Path:
    return make_bundle(tmp_path / "bundle", base)


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


@pytest.mark.invariant(1)
async def test_what_is_published_is_on_the_disk_with_its_names(
    registry: Registry, settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the answer takes nothing of it: files and the folders that name them were forced out before."""
    forced = note_fsync(monkeypatch)
    version, _ = await publish(registry, folder)

    inside = {path.name for path in forced if path.parent.name == version.digest and ".staging" in path.parts}
    assert inside == {CONFIG_FILE, WEIGHTS_FILE}
    place = registry.directory(version)
    assert {place, place.parent, settings.artifacts_dir, settings.manifests_dir} <= set(forced)
    assert any(path.parent == settings.manifests_dir and version.manifest_digest in path.name for path in forced)


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
