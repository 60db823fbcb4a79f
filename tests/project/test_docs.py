"""The docs say what the code does: generated pages are current, links lead somewhere, commands exist."""

from __future__ import annotations

import importlib.util
import re
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


def unknown_commands(texts: list[str]) -> list[str]:
    """Commands that the texts name and the command line does not have; a group alone is a name too."""
    groups = {command.split()[0] for command in known_commands() if " " in command}
    said = [words.split() for text in texts for words in COMMAND.findall(text)]
    return [
        " ".join(words)
        for words in said
        if words[0] not in known_commands()
        and " ".join(words) not in known_commands()
        and words not in [[g] for g in groups]
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_docs_exist(page: Path) -> None:
    code = re.findall(r"```[a-z]*\n(.*?)```|`([^`\n]+)`", page.read_text(), re.DOTALL)

    assert unknown_commands([text for block in code for text in block]) == []


@pytest.mark.parametrize("package", ["gateway", "trainer", "evals", "deploy"])
def test_commands_in_messages_exist(package: str) -> None:
    texts = {path.relative_to(ROOT): path.read_text() for path in (ROOT / package).rglob("*.py")}

    wrong = {str(path): unknown_commands(re.findall(r"`(turnout [^`\n]+)`", text)) for path, text in texts.items()}

    assert {path: found for path, found in wrong.items() if found} == {}


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text() + (ROOT / "docs" / "decisions" / "README.md").read_text()

    lost = [page for page in (ROOT / "docs").rglob("*.md") if page.name != "README.md" and page.name not in index]

    assert lost == []
