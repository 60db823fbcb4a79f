"""Writes the items of the suite `general-cloze`: hand-written lists put into templates, drawn with a seed.

python -m evals.tasks.cloze_items build/models/smollm2-135m-instruct evals/suites/general-cloze

An item is a prompt and two to four choices for its next token, one of them right. Words that the tokenizer splits are
left out, so that one request scores one item.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer

from . import cloze_words as words
from .cloze_words import Draft

SEED = 20
PER_KIND = 140


def world() -> Iterator[Draft]:
    """Capitals, continents and facts that schoolchildren know, and some that they don't."""
    capitals = list(words.CAPITALS.items())
    for index, (country, (capital, continent)) in enumerate(capitals):
        others = [capitals[(index + step) % len(capitals)][1][0] for step in (1, 7, 23)]
        yield Draft(f"The capital of {country} is", capital, others)
        if continent in words.CONTINENTS:
            elsewhere = words.CONTINENTS[(words.CONTINENTS.index(continent) + 1 + index % 2) % len(words.CONTINENTS)]
            yield Draft(f"On the map, {country} is a country in", continent, [elsewhere])
    yield from words.FACTS


def opposites() -> Iterator[Draft]:
    """Both directions of each pair; the wrong choices are words of the same class."""
    for group in words.OPPOSITES:
        for index, (left, right) in enumerate(group):
            strange = [word for step in (1, 4, 9) for word in group[(index + step) % len(group)]]
            yield Draft(f"The opposite of {left} is", right, strange)
            yield Draft(f"It was not {right} but the very opposite:", left, strange)


def arithmetic() -> Iterator[Draft]:
    """Results of one digit after worked examples; the wrong choice is off by one or two."""
    random_ = random.Random(SEED)  # noqa: S311
    for a in range(1, 10):
        for b in range(1, 10):
            if a + b <= 9:
                yield _sum(f"1 + 1 = 2\n3 + 2 = 5\n6 - 2 = 4\n{a} + {b} = ", a + b, random_)
                yield _sum(f"2 + 1 = 3\n3 + 2 = 5\n{a} + {b} = {a + b}, because {a + b} - {b} = ", a, random_)
            if a > b:
                yield _sum(f"1 + 1 = 2\n3 + 2 = 5\n6 - 2 = 4\n{a} - {b} = ", a - b, random_)
            if a + b <= 9 and a < b:
                yield _sum(f"Tom has {a} apples. He gets {b} more. Now he has ", a + b, random_)
            if a >= b:
                yield _sum(f"16 - 5 = 11\n18 - 4 = 14\n1{a} - {b} = 1", a - b, random_)
            if (a + 2 * b) % 5 == 0 and b > 1:
                yield _sum(f"6 / 2 = 3\n10 / 5 = 2\n16 / 4 = 4\n{a * b} / {b} = ", a, random_)


def agreement() -> Iterator[Draft]:
    """The verb follows its subject, whatever noun stands between them."""
    for index, (one, many) in enumerate(words.SUBJECTS):
        near, near_many = words.SUBJECTS[(index + 11) % len(words.SUBJECTS)]
        link = words.LINKS[index % len(words.LINKS)]
        singular, plural = words.VERBS[index % len(words.VERBS)]
        yield Draft(f"The {many} {link} the {near}", plural, [singular])
        yield Draft(f"The {one} {link} the {near_many}", singular, [plural])


def forms() -> Iterator[Draft]:
    """Plurals, past tenses and degrees, mostly irregular."""
    for one, many in words.PLURALS:
        yield Draft(f"I saw one {one}, and then I saw three more", many, [one])
    for now, past, participle in words.PASTS:
        yield Draft(f"Every day they {now}. Last week they also", past, [now, participle])
    for plain, more, most in words.DEGREES:
        yield Draft(f"This one is {plain}, but that one is even", more, [most, plain])
        yield Draft(f"Some are {plain}, some are {more}, and one of them is the", most, [more, plain])


def categories() -> Iterator[Draft]:
    """What kind of thing a thing is; the wrong choices are the neighbours in a list sorted by likeness."""
    names = list(words.CATEGORIES)
    for index, (category, members) in enumerate(words.CATEGORIES.items()):
        others = [names[(index + step) % len(names)] for step in (-2, -1, 1, 2, 3)]
        for member in members:
            article = "" if category in words.UNCOUNTABLE else "an " if member[0] in "aeiou" else "a "
            prompt = f"{article}{member} is a type of"
            yield Draft(prompt[0].upper() + prompt[1:], category, others)


def sequences() -> Iterator[Draft]:
    """What comes next; the wrong choice is another member of the same sequence."""
    for series in words.SERIES:
        for length in (2, 3, 4):
            for start in range(len(series) - length):
                shown, following = series[start : start + length], series[start + length]
                later = series[(start + length + 2) % len(series)]
                yield Draft(", ".join(shown) + ",", following, [shown[0] if later in shown else later])


def pronouns() -> Iterator[Draft]:
    """The pronoun follows the person."""
    for index, (person, is_male) in enumerate(words.PEOPLE):
        for offset in range(4):
            text, male, female = words.PRONOUN_TEMPLATES[(index + 3 * offset) % len(words.PRONOUN_TEMPLATES)]
            prompt = text.format(person=person)
            right, wrong = (male, female) if is_male else (female, male)
            yield Draft(prompt[0].upper() + prompt[1:], right, [wrong])


KINDS: dict[str, Callable[[], Iterable[Draft]]] = {
    "world": world,
    "opposites": opposites,
    "arithmetic": arithmetic,
    "agreement": agreement,
    "forms": forms,
    "categories": categories,
    "sequences": sequences,
    "pronouns": pronouns,
}


def one_token(tokenizer: Tokenizer, prompt: str, choice: str) -> bool:
    """Whether the choice is a single token after this prompt, and the prompt's own tokens stay what they are."""
    alone = tokenizer.encode(choice, add_special_tokens=False).ids
    before = tokenizer.encode(prompt, add_special_tokens=False).ids
    return len(alone) == 1 and tokenizer.encode(prompt + choice, add_special_tokens=False).ids == before + alone


def rows(kind: str, tokenizer: Tokenizer) -> list[dict[str, object]]:
    """The items of one kind, in the order in which looks take them."""
    drafts = {draft.prompt: draft for draft in KINDS[kind]()}
    usable = [item for draft in drafts.values() if (item := _choices(draft, tokenizer))]
    if len(usable) < PER_KIND:
        raise SystemExit(
            f"{kind}: {len(usable)} usable items of {len(drafts)}, {PER_KIND} are wanted; lengthen its lists"
        )
    chooser = random.Random(f"{SEED} {kind}")  # noqa: S311
    found: list[dict[str, object]] = []
    for number, (prompt, right, wrong) in enumerate(chooser.sample(usable, PER_KIND)):
        choices = [right, *wrong]
        chooser.shuffle(choices)
        found.append({"id": f"{kind}-{number}", "prompt": prompt, "choices": choices, "answer": choices.index(right)})
    return found


def _choices(draft: Draft, tokenizer: Tokenizer) -> tuple[str, str, list[str]] | None:
    """The draft with choices of one token each, at most three of them wrong; None when too few are left."""
    space = "" if draft.right.isdigit() else " "  # digits are tokens of their own: their space belongs to the prompt
    right = space + draft.right
    wrong = [space + word for word in dict.fromkeys(draft.wrong) if word != draft.right]
    wrong = [choice for choice in wrong if one_token(tokenizer, draft.prompt, choice)][:3]
    return (draft.prompt, right, wrong) if wrong and one_token(tokenizer, draft.prompt, right) else None


def main(base_model: Path, folder: Path) -> None:
    """Write one JSONL file a kind."""
    tokenizer = Tokenizer.from_file(str(base_model / "tokenizer.json"))
    for kind in KINDS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(kind, tokenizer)]
        (folder / f"{kind}.jsonl").write_text("".join(lines), encoding="utf-8")


def _sum(question: str, result: int, random_: random.Random) -> Draft:
    return Draft(question, str(result), [str(_near(result, 9, random_))])


def _near(value: int, most: int, random_: random.Random) -> int:
    return random_.choice([n for n in (value - 2, value - 1, value + 1, value + 2) if 0 <= n <= most])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
