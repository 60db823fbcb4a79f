import json
import subprocess
import sys
from pathlib import Path

import pytest

from evals.config import ClozeTask, ForgettingCheck, LoglikelihoodCheck, load_suite
from evals.power import DISCORDANCES, Power, simulate, suite_power

SUITES = Path(__file__).parents[2] / "evals" / "suites"
SHIPPED = sorted(path.parent.name for path in SUITES.glob("*/suite.yaml"))


def a_check(*, margin: float = 0.04, items: tuple[int, int] = (80, 140), tasks: int = 8) -> ForgettingCheck:
    named = tuple(ClozeTask(name=f"task{i}", data=f"task{i}.jsonl") for i in range(tasks))
    return ForgettingCheck(name="general", tasks=named, margin=margin, items=items)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_forgetting_check_passes_the_harmless_and_stops_the_harmful(name: str) -> None:
    suite = load_suite(SUITES / name)
    forgetting = [check for check in suite.checks if isinstance(check, ForgettingCheck | LoglikelihoodCheck)]

    found = [simulate(check, discordance=0.10, simulations=4000) for check in forgetting]

    assert all(power.pass_harmless >= 0.90 for power in found)
    assert all(power.pass_loss_of_twice_margin <= 0.01 for power in found)


def test_some_suite_ships_with_a_forgetting_check() -> None:
    assert any(isinstance(check, ForgettingCheck) for name in SHIPPED for check in load_suite(SUITES / name).checks)


def test_too_small_a_suite_is_found_out() -> None:
    found = simulate(a_check(margin=0.02, items=(50, 60), tasks=4), discordance=0.10, simulations=1000)

    assert found.pass_harmless < 0.5


def test_the_larger_look_saves_harmless_versions() -> None:
    found = simulate(a_check(), discordance=0.10, simulations=1000)

    assert found.pass_harmless > found.pass_harmless_first_look + 0.03


def test_a_loss_beyond_the_discordance_is_simulated_as_such() -> None:
    found = simulate(a_check(), discordance=0.05, simulations=500)

    assert found.pass_loss_of_twice_margin == 0


def test_power_covers_three_discordances() -> None:
    found = suite_power(load_suite(SUITES / "general-cloze"), simulations=50)

    assert [power.discordance for power in found] == list(DISCORDANCES)


def test_command_prints_json() -> None:
    command = [sys.executable, "-m", "evals.power", str(SUITES / "general-cloze"), "--json", "--simulations", "50"]

    done = subprocess.run(command, capture_output=True, text=True, check=True)

    found = [Power.model_validate(power) for power in json.loads(done.stdout)]
    assert [power.items for power in found] == [(640, 1120)] * 3


def test_command_says_what_is_wrong_with_a_suite(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "evals.power", str(tmp_path)], capture_output=True, text=True)

    assert done.returncode == 1
    assert "suite.yaml does not exist" in done.stderr
