"""The shipped suite `general-cloze`: what its items promise. Reads the base model's tokenizer."""

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from deploy.demo.phrases import CUES, PHRASINGS
from evals.config import ForgettingCheck, load_suite
from evals.items import ClozeItem, load_cloze_items
from evals.tasks.cloze_items import KINDS, one_token, rows

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "evals" / "suites" / "general-cloze"
BASE = ROOT / "build" / "models" / "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


@pytest.fixture(scope="module")
def items() -> dict[str, tuple[ClozeItem, ...]]:
    return {kind: load_cloze_items(FOLDER / f"{kind}.jsonl") for kind in KINDS}


def the_check() -> ForgettingCheck:
    (check,) = [check for check in load_suite(FOLDER).checks if isinstance(check, ForgettingCheck)]
    return check


def test_suite_names_every_kind_and_both_looks_have_their_items(items: dict[str, tuple[ClozeItem, ...]]) -> None:
    check = the_check()

    assert sorted(check.task_names) == sorted(items)
    assert len(items) >= 4
    assert {len(found) for found in items.values()} == {check.items[1]}
    assert len(items) * check.items[0] >= 600
    assert check.margin == 0.04


def test_every_choice_is_one_token_after_its_prompt(
    items: dict[str, tuple[ClozeItem, ...]], tokenizer: Tokenizer
) -> None:
    wrong = [
        (item.id, choice)
        for found in items.values()
        for item in found
        for choice in item.choices
        if not one_token(tokenizer, item.prompt, choice)
    ]

    assert wrong == []


def test_no_prompt_is_asked_twice(items: dict[str, tuple[ClozeItem, ...]]) -> None:
    prompts = [item.prompt for found in items.values() for item in found]

    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_right_answers_place_gives_nothing_away(items: dict[str, tuple[ClozeItem, ...]], kind: str) -> None:
    chance = sum(1 / len(item.choices) for item in items[kind]) / len(items[kind])

    first = sum(item.answer == 0 for item in items[kind]) / len(items[kind])

    assert first == pytest.approx(chance, abs=0.13)


@pytest.mark.parametrize("kind", list(KINDS))
def test_files_are_what_the_generator_writes(tokenizer: Tokenizer, kind: str) -> None:
    stored = [json.loads(line) for line in (FOLDER / f"{kind}.jsonl").read_text().splitlines()]

    assert stored == rows(kind, tokenizer)


def test_no_item_shares_a_run_of_words_with_the_demos_training_templates(
    items: dict[str, tuple[ClozeItem, ...]],
) -> None:
    known = [text for phrasing in PHRASINGS.values() for text in phrasing.known]
    cues = [cue for found in CUES.values() for cue in found]
    templates = set().union(*(runs(text) for text in [*known, *cues]))

    shared = [item.prompt for found in items.values() for item in found if not templates.isdisjoint(runs(item.prompt))]

    assert len(templates) > 500
    assert shared == []


def runs(text: str, length: int = 5) -> set[str]:
    words = re.findall(r"\w+", text.casefold())
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}
