"""Every import contract of `pyproject.toml` notices: a copy of the sources with one kind of bad import in it fails."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = {contract["name"]: contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"]}
PACKAGES = PYPROJECT["tool"]["importlinter"]["root_packages"]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"

AT_THE_TOP = "import {}\n"
IN_A_FUNCTION = "def planted() -> None:\n    import {}\n"
FOR_TYPES = "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import {}\n"

LAYERS = "Imports inside the gateway point down, and every module has its layer"
SEEN_BY_OTHERS = "trainer, evals and deploy see of the gateway what is named here"


@dataclass(frozen=True)
class Plant:
    """One import that a contract forbids."""

    importer: str
    imported: str
    how: str = AT_THE_TOP


SABOTAGE = {
    LAYERS: (
        Plant("gateway.registry.store", "gateway.cli_console"),
        Plant("gateway.keys", "gateway.cli_routes", IN_A_FUNCTION),
        Plant("gateway.cli_console", "gateway.cli_adapters"),
        Plant("gateway.routing.store", "gateway.rollouts.models", FOR_TYPES),
    ),
    "The gateway never imports the other halves": (
        Plant("gateway.jobs.service", "trainer.config"),
        Plant("gateway.registry.manifest", "evals.gates", IN_A_FUNCTION),
        Plant("gateway.supervisor", "deploy.engine.launch"),
    ),
    "trainer, evals and deploy do not know each other": (
        Plant("trainer.job", "evals.gates"),
        Plant("deploy.demo.run", "trainer.config", IN_A_FUNCTION),
    ),
    "Heavy packages are imported only where it is named, and nowhere in the gateway": (
        Plant("gateway.registry.service", "torch", IN_A_FUNCTION),
        Plant("gateway.registry.preflight", "peft", IN_A_FUNCTION),
        Plant("gateway.registry.artifacts", "lm_eval", IN_A_FUNCTION),
        Plant("gateway.engine.fleet", "vllm.config"),
        Plant("gateway.datasets.chat", "datasets", FOR_TYPES),
        Plant("trainer.export", "torch"),
        Plant("deploy.demo.run", "transformers", IN_A_FUNCTION),
    ),
    SEEN_BY_OTHERS: (
        Plant("trainer.job", "gateway.lease"),
        Plant("trainer.run", "gateway.server", IN_A_FUNCTION),
        Plant("trainer.export", "gateway.doctor"),
        Plant("trainer.data", "gateway.jobs.suites"),
        Plant("evals.job", "gateway.client"),
        Plant("deploy.demo.report", "gateway.registry.manifest", FOR_TYPES),
    ),
    "What they see of the gateway brings in no database, web server or settings": (
        Plant("gateway.registry.manifest", "sqlalchemy", IN_A_FUNCTION),
        Plant("gateway.jobs.workdir", "gateway.settings"),
        Plant("gateway.client_models", "fastapi"),
    ),
    "The proxy sees of the gateway what is named here": (
        Plant("gateway.proxy.resolution", "gateway.registry.service"),
        Plant("gateway.proxy.bodies", "gateway.datasets.store", IN_A_FUNCTION),
        Plant("gateway.proxy.completions", "gateway.settings", FOR_TYPES),
    ),
    "No web framework on the hot path, not through others either": (
        Plant("gateway.proxy.app", "fastapi"),
        Plant("gateway.proxy.asgi", "starlette.types", FOR_TYPES),
        Plant("gateway.metrics", "uvicorn"),
    ),
    "No Pydantic and no SQLAlchemy on the hot path, but for what is named here": (
        Plant("gateway.proxy.bodies", "pydantic"),
        Plant("gateway.proxy.app", "sqlalchemy", IN_A_FUNCTION),
        Plant("gateway.engine.client", "pydantic"),
    ),
    "Pure modules import, also through others, nothing that reaches outside": (
        Plant("gateway.rollouts.pointers", "sqlalchemy"),
        Plant("gateway.engine.plan", "gateway.database", IN_A_FUNCTION),
        Plant("gateway.routing.assignment", "random"),
        Plant("gateway.jobs.models", "pathlib"),
        Plant("evals.gates", "httpx"),
        Plant("evals.statistics", "subprocess", IN_A_FUNCTION),
    ),
}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The sources and their contracts, to be spoilt."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def source(root: Path, module: str) -> Path:
    """The file of a module."""
    return root.joinpath(*module.split(".")).with_suffix(".py")


def plant(root: Path, planted: Plant) -> None:
    """Put the import at the end of its module."""
    with source(root, planted.importer).open("a") as file:
        file.write(f"\n{planted.how.format(planted.imported)}")


def lint(root: Path) -> tuple[int, str]:
    """What `make check` says of the imports: the exit code and the report."""
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "1000"}
    argv = [sys.executable, "-c", LINT, "--no-cache", "--no-logo"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=root, env=environment)
    return done.returncode, done.stdout


def broken(report: str) -> set[str]:
    """Names of the contracts that the report calls broken."""
    return {name for name in CONTRACTS if re.search(rf"^{re.escape(name)} BROKEN", report, re.MULTILINE)}


def named(report: str, contract: str) -> set[tuple[str, str]]:
    """(importer, imported) of every import that the report holds against a contract."""
    explained = report.partition("Broken contracts")[2]
    starts = {
        found.start(): name
        for name in CONTRACTS
        for found in re.finditer(rf"^{re.escape(name)}$", explained, re.MULTILINE)
    }
    begin = next(start for start, name in starts.items() if name == contract)
    end = min((start for start in starts if start > begin), default=len(explained))
    return set(re.findall(r"([\w.]+)(?: \(l\.[^)]*\))? -> ([\w.]+)", explained[begin:end]))


def test_the_sources_keep_every_contract(copy: Path) -> None:
    code, report = lint(copy)

    assert code == 0, report
    assert f"{len(CONTRACTS)} kept, 0 broken" in report


@pytest.mark.parametrize("contract", SABOTAGE)
def test_planted_imports_break_their_contract(copy: Path, contract: str) -> None:
    for planted in SABOTAGE[contract]:
        plant(copy, planted)

    code, report = lint(copy)

    assert code == 1
    assert contract in broken(report)
    wanted = {(planted.importer, _shown(planted.imported)) for planted in SABOTAGE[contract]}
    assert wanted - named(report, contract) == set(), report


def _shown(imported: str) -> str:
    """Of packages that are not ours, the linter knows the name alone."""
    root = imported.partition(".")[0]
    return imported if root in PACKAGES else root


def test_a_module_without_a_layer_is_refused(copy: Path) -> None:
    source(copy, "gateway.newcomer").write_text('"""Nobody said where it belongs."""\n')

    code, report = lint(copy)

    assert code == 1
    assert broken(report) == {LAYERS}
    assert "- gateway.newcomer" in report


def test_a_new_module_of_the_gateway_is_hidden_from_the_other_halves(copy: Path) -> None:
    source(copy, "gateway.registry.newcomer").write_text('"""Nobody said who may see it."""\n')
    planted = Plant("trainer.export", "gateway.registry.newcomer")
    plant(copy, planted)

    code, report = lint(copy)

    assert code == 1
    assert named(report, SEEN_BY_OTHERS) == {(planted.importer, planted.imported)}


def test_an_exception_that_nothing_uses_any_more_is_refused(copy: Path) -> None:
    path = source(copy, "deploy.demo.traffic")
    path.write_text(re.sub(r"^( *)(?:from|import) openai.*$", r"\1pass", path.read_text(), flags=re.MULTILINE))

    code, report = lint(copy)

    assert code == 1
    assert "deploy.demo.traffic -> openai" in report


def test_every_contract_has_its_sabotage() -> None:
    assert SABOTAGE.keys() == CONTRACTS.keys()


def test_every_module_that_says_it_is_pure_is_held_to_it() -> None:
    (contract,) = (contract for contract in CONTRACTS.values() if contract.get("forbidden_modules") == ["*"])

    pure = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"\bPure\b", (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0])
    }

    assert pure == set(contract["source_modules"])


def test_what_only_an_extra_installs_counts_as_heavy() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    wanted = [
        re.split(r"[\[<>=]", requirement)[0].replace("-", "_").removesuffix("_cpu")
        for extra in extras.keys() - {"dev"}
        for requirement in extras[extra]
    ]
    (heavy,) = (contract["forbidden_modules"] for name, contract in CONTRACTS.items() if name.startswith("Heavy"))

    assert set(wanted) - set(heavy) == set()
