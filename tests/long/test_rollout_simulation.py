"""Random moves of traffic, thousands of them, against a model of what a route may do; and guards taken out one by one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.rollouts import decided, pointers, promotion

from .areas import seeds
from .rollout_checks import Disagreement
from .rollout_world import a_simulation

SEEDS = seeds(200)
pytestmark = [pytest.mark.long, pytest.mark.timeout(900 * max(1, SEEDS // 200))]

ONE_SEED = os.environ.get("TURNOUT_SIMULATION_SEED")
STEPS_PER_SEED = 200
MUTANT_SEEDS = range(1001, 1009)
HAPPENS = (
    "route.promote",
    "route.rollback",
    "route.set_variants",
    "unforced promotions",
    "trials withdrawn",
    "repeats",
    "one moved",
)


@pytest.fixture
def home() -> Iterator[Path]:
    """On memory where there is some: the proof is about moves, and a disk's fsync is not what it waits for."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="turnout-simulation-", dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path)


@pytest.mark.invariant(6)
@pytest.mark.invariant(7)
async def test_routes_move_as_the_model_says(home: Path) -> None:
    done: Counter[str] = Counter()
    first = int(ONE_SEED or 1)
    chosen = range(first, first + (1 if ONE_SEED else SEEDS))
    await _simulate(home, chosen, done)

    print(f"seeds {chosen.start} to {chosen.stop - 1}: {dict(sorted(done.items()))}")  # noqa: T201
    assert min(done[kind] for kind in HAPPENS) > 0, "a simulation in which nothing moves proves nothing"


async def _simulate(home: Path, seeds: range, done: Counter[str]) -> None:
    for seed in seeds:
        async with a_simulation(home / str(seed), seed) as simulation:
            await simulation.run(STEPS_PER_SEED)
            done.update(simulation.done)
        shutil.rmtree(home / str(seed))


async def _nothing(*arguments: object, **options: object) -> None:
    return None


def _without_residency(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(promotion, "check_resident", _nothing)


def _without_gates(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(promotion, "check_gates", _nothing)


def _without_marks(patch: pytest.MonkeyPatch) -> None:
    real = pointers.promote
    patch.setattr(promotion, "promote", lambda held, target, past, *, force: real(held, target, past, force=True))


def _without_the_revision(patch: pytest.MonkeyPatch) -> None:
    real = promotion._held

    async def unbound(connection: Any, name: str, principal: Any, expected: int | None) -> Any:
        return await real(connection, name, principal, None)

    patch.setattr(promotion, "_held", unbound)


def _without_audit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(promotion, "_audit", _nothing)


def _back_to_what_was_rolled_back(patch: pytest.MonkeyPatch) -> None:
    def older(name: str, versions: Any, *, base: str, leaving: Any) -> str:
        number = next((past.version for past in versions if past.name == name), 0)
        found = [past for past in versions if past.version < number and past.was_stable]
        return found[-1].name if found else base

    patch.setattr(pointers, "next_older", older)


def _without_verification(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(promotion, "check_verified", lambda version: None)


def _without_withdrawal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decided, "tried_by", lambda stable, arms, said: ())


def _without_memory_of_answers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(promotion, "first_answer", _nothing)


def _without_a_second_thought(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(promotion, "check_goes_no_further", lambda *arguments, **options: None)


def _without_looking_whether_it_is_loaded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(promotion, "check_strands_nobody", _nothing)


def _forced_counts_as_gated(patch: pytest.MonkeyPatch) -> None:
    real = decided.promoted
    patch.setattr(promotion, "promoted", lambda held, move, mover, *, is_gated: real(held, move, mover, is_gated=True))


GUARDS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "residency": _without_residency,
    "gates": _without_gates,
    "marks": _without_marks,
    "revision": _without_the_revision,
    "audit": _without_audit,
    "way back": _back_to_what_was_rolled_back,
    "withdrawal": _without_withdrawal,
    "repeats": _without_memory_of_answers,
    "second step": _without_a_second_thought,
    "load": _without_looking_whether_it_is_loaded,
    "forced is not gated": _forced_counts_as_gated,
    "verification": _without_verification,
}


@pytest.mark.mutant(6)
@pytest.mark.mutant(7)
@pytest.mark.parametrize("guard", GUARDS)
async def test_a_guard_that_is_gone_would_be_found(home: Path, monkeypatch: pytest.MonkeyPatch, guard: str) -> None:
    GUARDS[guard](monkeypatch)

    with pytest.raises(Disagreement) as found:
        await _simulate(home, MUTANT_SEEDS, Counter())

    print(str(found.value).splitlines()[0][:300])  # noqa: T201
