"""Kill a publishing process at each of its steps, then see what a new one finds. Run by `test_registry_crash.py`.

    python -m tests.integration.crash_publish DIRECTORY [unsafe]

Prints one JSON object a step: where it died, and what was wrong afterwards (nothing, one hopes).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from gateway.database import DEFAULT_PROJECT, Database
from gateway.errors import Refused
from gateway.migrations.run import migrate
from gateway.registry.artifacts import Artifacts
from gateway.registry.base_family import BaseFamily, load_base_family
from gateway.registry.manifest import CONFIG_FILE, WEIGHTS_FILE
from gateway.registry.preflight import Preflighted
from gateway.registry.service import Registry
from gateway.settings import Settings
from tests.corpus import make_base, make_bundle

CALLS = ("fsync", "rename", "replace", "mkdir", "chmod")
KILLED = 137


class Killer:
    """Ends the process, as kill -9 does, before or after its n-th step that touches the disk; counts them."""

    def __init__(self, at: int | None, *, before: bool) -> None:
        self.at, self.before, self.steps = at, before, 0

    def watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.steps += 1
            if self.before and self.steps == self.at:
                os._exit(KILLED)
            try:
                return call(*arguments, **options)
            finally:
                if self.steps == self.at:
                    os._exit(KILLED)

        return watched

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.watch(name, getattr(os, name)))


async def publish(home: Path, base: BaseFamily, source: Path) -> Registry:
    """One publish; returns the registry for questions."""
    settings = Settings(home=home)
    database = Database(settings.database)
    registry = Registry(database, settings, base)
    await registry.start()
    await registry.publish("support", source, actor="key:test", project_id=DEFAULT_PROJECT)
    await database.close()
    return registry


async def faults(home: Path, base: BaseFamily, source: Path) -> list[str]:
    """What a new process finds wrong after the crash, and after publishing again."""
    settings = Settings(home=home)
    found = []
    database = Database(settings.database)
    registry = Registry(database, settings, base)
    for version in await registry.versions():
        found += broken(version.name, partial(registry.verify_files, version))
        found += broken(version.name, partial(registry.manifest, version))
    artifacts = Artifacts(settings.artifacts_dir, settings.manifests_dir)
    for directory in settings.artifacts_dir.glob("??/*"):
        found += broken(f"directory {directory.name[:12]}", partial(artifacts.verify, directory.name))
    await database.close()
    registry = await publish(home, base, source)
    if list((settings.artifacts_dir / ".staging").glob("*")):
        found.append("staging is not clean")
    database = Database(settings.database)
    versions = await Registry(database, settings, base).versions()
    await database.close()
    if [version.name for version in versions] != ["support@1"]:
        found.append(f"after publishing again there are {[version.name for version in versions]}")
    for version in versions:
        found += broken(f"again {version.name}", partial(registry.verify_files, version))
    return found


def broken(what: str, check: Callable[[], object]) -> list[str]:
    """The check's complaint, if it has one."""
    try:
        check()
    except Refused as error:
        return [f"{what}: {error.code}"]
    return []


def install_in_place(self: Artifacts, staged: Path, checked: Preflighted) -> Path:
    """The mutant: files written where they will be served from, one after the other."""
    target = self.directory(checked.digest)
    target.mkdir(parents=True, exist_ok=True)
    (target / WEIGHTS_FILE).write_bytes((staged / WEIGHTS_FILE).read_bytes())
    os.chmod(target / WEIGHTS_FILE, 0o644)  # noqa: PTH101
    (target / CONFIG_FILE).write_bytes(checked.config_bytes)
    return target


def forked(work: Callable[[], Coroutine[Any, Any, Any]], report: Path | None = None) -> int:
    """Run in a child process; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            result = asyncio.run(work())
            if report is not None:
                report.write_text(json.dumps(result))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(directory: Path, *, unsafe: bool) -> None:
    """Every step, before and after."""
    if unsafe:
        Artifacts.install = install_in_place  # type: ignore[method-assign]
    make_base(directory / "base")
    base = load_base_family("tiny", directory / "base")
    source = make_bundle(directory / "bundle", base)
    clean = directory / "clean"
    Settings(home=clean).prepare_directories()
    forked(lambda: migrate(Settings(home=clean)))

    async def doomed(home: Path, at: int | None, before: bool) -> int:
        killer = Killer(at, before=before)
        killer.install()
        await publish(home, base, source)
        return killer.steps

    shutil.copytree(clean, directory / "count")
    forked(lambda: doomed(directory / "count", None, False), directory / "steps")
    steps = json.loads((directory / "steps").read_text())
    for at in range(1, steps + 1):
        for before in (True, False):
            home = directory / f"{at}-{before}"
            shutil.copytree(clean, home)
            status = forked(partial(doomed, home, at, before))
            report = directory / "report"
            ended = forked(partial(faults, home, base, source), report)
            found = json.loads(report.read_text()) if ended == 0 else [f"the new process ended with {ended}"]
            print(json.dumps({"step": at, "before": before, "killed": status == KILLED, "faults": found}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), unsafe="unsafe" in sys.argv[2:])
