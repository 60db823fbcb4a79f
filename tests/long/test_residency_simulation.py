"""Engines that die, loads that fail, files that rot, controllers that come and go: what is loaded is what should be."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.engine import admin, evidence, lifecycle, reconciler, replicas
from gateway.engine.admin import EngineAdmin
from gateway.engine.plan import Observed
from gateway.engine.reconciler import Converger
from gateway.registry.service import Registry

from . import residency_model
from .areas import seeds
from .residency_model import Disagreement
from .residency_world import a_simulation

SEEDS = seeds(20)
pytestmark = [pytest.mark.long, pytest.mark.timeout(1200 * max(1, SEEDS // 20))]

ONE_SEED = os.environ.get("TURNOUT_SIMULATION_SEED")
STEPS_PER_SEED = 60
MUTANT_SEEDS = range(1001, 1021)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits of the real code are for real engines; the order of things is the same with short ones."""
    monkeypatch.setattr(replicas, "_IDLE_S", 0.005)
    monkeypatch.setattr(lifecycle, "MAX_BACKOFF_S", 0.02)
    monkeypatch.setattr(reconciler, "SETTLE_S", 0.03)
    monkeypatch.setattr(evidence, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(evidence, "LATEST_PAUSE_S", 0.05)
    monkeypatch.setattr(reconciler, "FIRST_LOOK_S", 0.01)
    monkeypatch.setattr(reconciler, "LATEST_LOOK_S", 0.05)
    monkeypatch.setattr(admin, "_LOAD_TIMEOUT_S", 0.5)


@pytest.fixture
def home() -> Iterator[Path]:
    """On memory where there is some."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="turnout-residency-", dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path)


async def _simulate(home: Path, seeds: range, done: Counter[str]) -> None:
    for seed in seeds:
        async with a_simulation(home / str(seed), seed) as simulation:
            await simulation.run(STEPS_PER_SEED)
            done.update(simulation.done)
            done["engines started"] += simulation.fleet.starts
            done["versions"] += len(simulation.versions)


@pytest.mark.invariant(4)
@pytest.mark.invariant(5)
async def test_engines_hold_what_they_should_whatever_happens(home: Path) -> None:
    done: Counter[str] = Counter()
    first = int(ONE_SEED or 1)
    chosen = range(first, first + (1 if ONE_SEED else SEEDS))

    await _simulate(home, chosen, done)

    print(f"seeds {chosen.start} to {chosen.stop - 1}: {dict(sorted(done.items()))}")  # noqa: T201
    assert done["engines started"] > len(chosen), "a simulation in which no engine dies proves nothing"


async def test_deaths_with_a_recovery_between_them_condemn_nobody(home: Path) -> None:
    async with a_simulation(home, seed=1) as simulation:
        name = await simulation.publish_good()
        for _ in range(3):
            simulation.late[name] = "never"
            await simulation.kill()
            await simulation.until(lambda: simulation.rows().get(name) == "loading")
            await simulation.kill()
            await simulation.calm()

        assert simulation.rows() == {name: "ready"}


def _without_probe(patch: pytest.MonkeyPatch) -> None:
    async def unasked(*arguments: object) -> None:
        return None

    patch.setattr(Converger, "_probe", unasked)


def _without_digest(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Registry, "verify_files", lambda self, version: None)


def _without_quarantine(patch: pytest.MonkeyPatch) -> None:
    async def forgiving(*arguments: object) -> None:
        return None

    patch.setattr(Converger, "_condemn", forgiving)


def _without_suspicion(patch: pytest.MonkeyPatch) -> None:
    async def trusting(*arguments: object) -> tuple[list[str], bool]:
        return [], False

    patch.setattr(Converger, "suspects", trusting)


def _without_cap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reconciler, "Observed", lambda **seen: Observed(**(seen | {"capacity": 10**6})))


def _without_touch(patch: pytest.MonkeyPatch) -> None:
    async def untouched(*arguments: object) -> None:
        return None

    patch.setattr(Converger, "_touch", untouched)


def _in_place(patch: pytest.MonkeyPatch) -> None:
    async def load(self: EngineAdmin, name: str, directory: Path) -> None:
        body: dict[str, Any] = {"lora_name": name, "lora_path": str(directory), "load_inplace": True}
        await self._call("POST", "/v1/load_lora_adapter", body)

    patch.setattr(EngineAdmin, "load", load)


GUARDS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "probe": _without_probe,
    "digest": _without_digest,
    "quarantine": _without_quarantine,
    "suspicion": _without_suspicion,
    "room": _without_cap,
    "touch": _without_touch,
    "never in place": _in_place,
}


@pytest.mark.mutant(4)
@pytest.mark.mutant(5)
# Without a guard the engine dies over and over, here inside this process, and leaves a connection it had just accepted.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("guard", GUARDS)
async def test_a_guard_that_is_gone_would_be_found(home: Path, monkeypatch: pytest.MonkeyPatch, guard: str) -> None:
    monkeypatch.setattr(residency_model, "CALM_WITHIN_S", 5.0)
    GUARDS[guard](monkeypatch)

    with pytest.raises(Disagreement) as found:
        await _simulate(home, MUTANT_SEEDS, Counter())

    print(str(found.value).splitlines()[0][:300])  # noqa: T201
