"""Rules of the code: light imports, presets that load, a proof and a mutant for every invariant."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.config import load_config, presets

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "vllm", "transformers", "peft", "trl", "lm_eval", "datasets", "accelerate")
INVARIANTS = range(1, 12)
IMPORT_ALL = """
import importlib, json, pkgutil, sys
import gateway
names = [m.name for m in pkgutil.walk_packages(gateway.__path__, "gateway.") if ".versions." not in m.name and not m.name.endswith(".env")]
for name in names:
    importlib.import_module(name)
print(json.dumps({"imported": len(names), "loaded": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def test_the_gateway_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True, cwd=ROOT)

    found = json.loads(done.stdout)
    assert found["imported"] > 50
    assert [name for name in HEAVY if name in found["loaded"]] == []


def test_starting_the_command_line_is_light() -> None:
    code = "import sys, gateway.cli; print(sorted(n for n in ('fastapi', 'uvicorn', 'alembic', 'scipy', 'sqlalchemy') if n in sys.modules))"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads(name: str) -> None:
    config = load_config(name)

    assert config.recipe == "sft"


def test_there_is_a_preset() -> None:
    assert "sft" in presets()


def marks(kind: str) -> Iterator[tuple[int, str]]:
    """(n, test) of every test that carries `@pytest.mark.<kind>(n)`, or whose class or module does."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        everywhere = [n for node in tree.body if _is_pytestmark(node) for n in _numbers(node, kind)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                own = [n for decorator in node.decorator_list for n in _numbers(decorator, kind)]
                for number in (*own, *everywhere):
                    yield number, f"{path.name}::{node.name}"


def _is_pytestmark(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "pytestmark" for target in node.targets)


def _numbers(node: ast.AST, kind: str) -> Iterator[int]:
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == kind:
            yield from (
                argument.value
                for argument in call.args
                if isinstance(argument, ast.Constant) and isinstance(argument.value, int)
            )


@pytest.mark.parametrize("number", INVARIANTS)
@pytest.mark.parametrize("kind", ["invariant", "mutant"])
def test_every_invariant_has_its_proof_and_its_mutant(kind: str, number: int) -> None:
    found = [name for marked, name in marks(kind) if marked == number]

    assert found != [], f"no test is marked @pytest.mark.{kind}({number})"


def test_marks_name_invariants_that_exist() -> None:
    wrong = [name for kind in ("invariant", "mutant") for number, name in marks(kind) if number not in INVARIANTS]

    assert wrong == []
