"""The docs say what the code does: generated pages are current, links lead somewhere, commands exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?<![\w./])turnout ((?:[a-z]+ ?){1,2})")


@cache
def generator() -> ModuleType:
    """`docs/generate.py`, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["configuration.md", "cli.md", "api.md", "metrics.md", "reason-codes.md"])
def test_a_generated_page_is_current(page: str) -> None:
    module = generator()

    written = (ROOT / "docs" / "reference" / page).read_text()

    assert written == f"{module.NOTE}\n{module.PAGES[page]()}", "run .venv/bin/python docs/generate.py"


def test_every_generated_page_is_tested() -> None:
    assert set(generator().PAGES) == {path.name for path in (ROOT / "docs" / "reference").glob("*.md")}


def test_every_setting_says_what_it_is() -> None:
    from gateway.settings import Settings

    silent = [name for name, _, field in generator().settings(Settings) if not field.description]

    assert silent == []


def test_every_metric_is_named_after_the_product_and_explained() -> None:
    from gateway.metrics import Metrics

    found = list(generator().collectors(Metrics()))

    assert len(found) > 10
    assert [name for name, _, _, text in found if not name.startswith("turnout_") or not text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            dead.append(target)

    assert dead == []


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def known_commands() -> frozenset[str]:
    """`eval run`, `serve`, ..."""
    import typer.main

    from gateway.cli import app

    return frozenset(" ".join(path[1:]) for path, _ in generator().commands(typer.main.get_command(app), ("turnout",)))


def unknown_commands(texts: Iterable[str], *, groups_count: bool = False) -> list[str]:
    """Commands that the texts name and the command line does not have. A group alone does nothing, but may be a name."""
    known = set(known_commands())
    if groups_count:
        known |= {command.split()[0] for command in known if " " in command}
    said = [words.split() for text in texts for words in COMMAND.findall(text)]
    return [" ".join(words) for words in said if words[0] not in known_commands() and " ".join(words) not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_docs_exist(page: Path) -> None:
    code = re.findall(r"```[a-z]*\n(.*?)```|`([^`\n]+)`", page.read_text(), re.DOTALL)

    assert unknown_commands([text for block in code for text in block], groups_count=True) == []


@pytest.mark.parametrize("package", ["gateway", "trainer", "evals", "deploy"])
def test_commands_in_messages_exist(package: str) -> None:
    paths = sorted((ROOT / package).rglob("*.py"))

    wrong = {str(path.relative_to(ROOT)): unknown_commands(quoted_commands(path)) for path in paths}

    assert {path: found for path, found in wrong.items() if found} == {}


def test_a_group_of_commands_is_no_command_to_send_somebody_to() -> None:
    assert unknown_commands(["turnout adapters", "turnout adapters list", "turnout serve"]) == ["adapters"]
    assert unknown_commands(["turnout adapters", "turnout nonsense"], groups_count=True) == ["nonsense"]


def quoted_commands(path: Path) -> list[str]:
    """What stands in backticks in the module's strings and in the help of its commands; not in what introduces the module."""
    tree = ast.parse(path.read_text())
    introduction = tree.body[0].value if tree.body and isinstance(tree.body[0], ast.Expr) else None
    strings = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node is not introduction
    ]
    return [command for text in strings for command in re.findall(r"`(turnout [^`\n]+)", text)]


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text() + (ROOT / "docs" / "decisions" / "README.md").read_text()

    lost = [page for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md" and page.name not in index]

    assert lost == []
