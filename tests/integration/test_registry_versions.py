"""What a published version keeps: its state, its bytes, and itself whole on a disk that fails."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from gateway.database import Database
from gateway.errors import Conflict, GatewayError, Invalid, NotFound, Refused, StorageFull, Unavailable
from gateway.registry import store
from gateway.registry.artifacts import Artifacts
from gateway.registry.base_family import BaseFamily
from gateway.registry.manifest import CONFIG_FILE, WEIGHTS_FILE
from gateway.registry.models import VersionState
from gateway.registry.service import Registry
from gateway.settings import Settings
from tests.corpus import make_base, make_bundle
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


@pytest.mark.parametrize("state", [VersionState.RECEIVED, VersionState.REJECTED])
async def test_a_version_that_was_verified_is_never_judged_anew(
    registry: Registry, folder: Path, state: VersionState
) -> None:
    version, _ = await publish(registry, folder)
    verified = await registry.set_state(version.id, VersionState.VERIFIED, code=None, reason=None, actor="controller")

    with pytest.raises(Conflict) as caught:
        await registry.set_state(version.id, state, code="digest_mismatch", reason="damaged", actor="controller")

    assert caught.value.code == "state_final"
    assert await registry.version(version.name) == verified


async def test_a_state_is_saved_only_over_the_one_that_was_read(
    registry: Registry, database: Database, folder: Path
) -> None:
    read, _ = await publish(registry, folder)
    await registry.set_state(read.id, VersionState.QUARANTINED, code="x", reason=None, actor="controller")

    async with database.write() as connection:
        moved = await store.update_state(connection, read, state=VersionState.VERIFIED, code=None, reason=None)

    assert not moved
    assert (await registry.version(read.name)).state is VersionState.QUARANTINED


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


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
async def test_files_that_cannot_be_read_now_are_not_called_damaged(
    registry: Registry, settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    version, _ = await publish(registry, folder)
    for step in range(2):  # the directory, and a file in it
        failing = Failing(os.open, OSError(number, os.strerror(number), str(settings.home)), after=step)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", failing)
            with pytest.raises(Unavailable) as caught:
                registry.verify_files(version)
        assert failing.failed
        assert (caught.value.code, str(settings.home) in caught.value.message) == ("storage_failed", False)

    registry.verify_files(version)


async def test_no_message_of_damage_names_a_path(registry: Registry, settings: Settings, folder: Path) -> None:
    version, _ = await publish(registry, folder)
    flip(registry.directory(version) / WEIGHTS_FILE)
    flip(settings.manifests_dir / f"{version.manifest_digest}.json")

    with pytest.raises(Refused) as files:
        registry.verify_files(version)
    with pytest.raises(Refused) as manifest:
        registry.manifest(version)

    assert [str(settings.home) in error.value.message for error in (files, manifest)] == [False, False]


async def test_a_received_version_may_have_a_reason_to_wait(registry: Registry, folder: Path) -> None:
    version, _ = await publish(registry, folder)
    received = VersionState.RECEIVED

    waiting = await registry.set_state(version.id, received, code="digest_mismatch", reason="damaged", actor="c")
    assert (waiting.state, waiting.state_code, waiting.state_reason) == (received, "digest_mismatch", "damaged")
    whole = await registry.set_state(version.id, received, code=None, reason=None, actor="c")

    assert whole == version == await registry.version(version.name)


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
        assert str(settings.home) not in error.message
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
