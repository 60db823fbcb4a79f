"""One real stack for all end-to-end tests: supervisor, gateway, controller, vLLM on CPU, real base model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.registry.base_family import BaseFamily, load_base_family
from tests.corpus import make_adapter

from .stack import BASE, BASE_PATH, Stack


@pytest.fixture(scope="session")
def base_family() -> BaseFamily:
    if not BASE_PATH.is_dir():
        pytest.fail("the base model is missing: run `make base-model`")
    return load_base_family(BASE, BASE_PATH)


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """Started once; tests that kill parts of it wait until it has healed."""
    home = Path(tempfile.mkdtemp(prefix="turnout-e2e-"))
    running = Stack(home)
    running.start()
    try:
        yield running
    finally:
        running.kill_all()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def weights(base_family: BaseFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain PEFT folders whose log-probabilities differ by nats: seeds 1 to 4."""
    folder = tmp_path_factory.mktemp("weights")
    for seed in (1, 2, 3, 4):
        make_adapter(folder / f"seed{seed}", base_family, seed=seed, scale=0.9)
    return folder


@pytest.fixture(scope="session")
def alpha(stack: Stack, weights: Path) -> str:
    """Adapter `alpha` with versions 1, 2 and 3, verified and resident."""
    for seed in (1, 2, 3):
        answer = stack.publish(weights / f"seed{seed}", "alpha")
        assert answer.status_code == 201, answer.text
    for seed in (1, 2, 3):
        stack.wait_resident(f"alpha@{seed}")
    return "alpha"
