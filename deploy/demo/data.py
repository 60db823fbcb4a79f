"""Make the demo's data: customer e-mails, and the JSON that a tuned model should answer with.

    python -m deploy.demo.data build/demo/data --seed 0

The same seed gives the same bytes. No product, order number, name or city of one file appears in another.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product as pairs
from pathlib import Path
from typing import Literal, TypeVar

from faker import Faker
from pydantic import BaseModel, Field

from .phrases import CUES, GREETINGS, ITEMS, MATERIALS, PHRASINGS, Intent, Urgency

SYSTEM_PROMPT = (
    "Turn the e-mail into JSON: intent (track, cancel, return, defect, address, invoice), "
    "order, product, urgency (low, normal, high)."
)
MAX_TOKENS = 48  # of an answer; the longest right one has 37 and its end
SIZES = {"train": 800, "validation": 100, "heldout": 200, "unseen": 120, "shuffled": 320}
T = TypeVar("T")
PRODUCT_SHARES = {"train": 0.6, "validation": 0.1, "heldout": 0.15, "unseen": 0.15}


class Answer(BaseModel, frozen=True):
    """What the model should say about one e-mail."""

    intent: Intent
    order: str = Field(pattern=r"^[A-Z]{2}-[0-9]{3}$")
    product: str
    urgency: Urgency

    def text(self) -> str:
        """The one spelling that counts as exact."""
        return json.dumps(self.model_dump())


@dataclass(frozen=True)
class Example:
    """One e-mail and its answer."""

    email: str
    answer: Answer

    def row(self) -> dict[str, list[dict[str, str]]]:
        """The example in chat format."""
        return {
            "messages": [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": self.email},
                {"role": "assistant", "content": self.answer.text()},
            ]
        }


@dataclass(frozen=True)
class DemoData:
    """Where the demo's files lie."""

    train: Path
    validation: Path
    heldout: Path
    unseen: Path
    shuffled: Path


class _Writer:
    """Draws examples; every name, city and order number at most once."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - data, not secrets
        self._faker = Faker("en_US")
        self._faker.seed_instance(seed)
        self._orders: set[str] = set()
        self._products = self._split_products()

    def _split_products(self) -> dict[str, list[str]]:
        every = [f"{material} {item}" for material, item in pairs(MATERIALS, ITEMS)]
        self._random.shuffle(every)
        split, start = {}, 0
        for name, share in PRODUCT_SHARES.items():
            end = start + round(share * len(every))
            split[name] = every[start:end]
            start = end
        return split

    def _order(self) -> str:
        while True:
            letters = "".join(self._random.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=2))
            order = f"{letters}-{self._random.randrange(100, 1000)}"
            if order not in self._orders:
                self._orders.add(order)
                return order

    def _signature(self) -> str:
        name = self._faker.unique.name()
        return self._random.choice((name, f"{name}, {self._faker.unique.city()}"))

    def _email(self, phrasing: str, cue: str, answer: Answer) -> str:
        said = phrasing.format(order=answer.order, product=answer.product)
        body = self._random.choice((f"{said} {cue}", f"{said} {cue}", f"{cue} {said}"))
        return f"{self._random.choice(GREETINGS)} {body}\n{self._signature()}"

    def _cycle(self, values: Sequence[T]) -> Iterator[T]:
        """Endless, each value equally often, in an order that is new each round."""
        while True:
            yield from self._random.sample(values, len(values))

    def examples(self, split: str, count: int, *, wording: Literal["known", "unseen"]) -> list[Example]:
        """Balanced over intents, phrasings, urgencies and cues."""
        phrasings = {intent: self._cycle(getattr(found, wording)) for intent, found in PHRASINGS.items()}
        cues = {urgency: self._cycle(found) for urgency, found in CUES.items()}
        intents, urgencies = self._cycle(tuple(PHRASINGS)), self._cycle(tuple(CUES))
        products = self._cycle(self._products[split])
        made = []
        for _ in range(count):
            intent, urgency = next(intents), next(urgencies)
            answer = Answer(intent=intent, order=self._order(), product=next(products), urgency=urgency)
            made.append(Example(self._email(next(phrasings[intent]), next(cues[urgency]), answer), answer))
        return made

    def shuffled(self, examples: Sequence[Example], count: int) -> list[Example]:
        """What a faulty join makes of good rows: each e-mail with the answer of another one."""
        chosen = self._random.sample(examples, count)
        return [Example(row.email, chosen[index - 1].answer) for index, row in enumerate(chosen)]


def _write(path: Path, examples: Sequence[Example]) -> None:
    path.write_text("".join(json.dumps(example.row()) + "\n" for example in examples))


def make_demo_data(directory: Path, seed: int) -> DemoData:
    """Write all files of the demo's data into `directory`."""
    writer = _Writer(seed)
    train = writer.examples("train", SIZES["train"], wording="known")
    files = {
        "train": train,
        "validation": writer.examples("validation", SIZES["validation"], wording="known"),
        "heldout": writer.examples("heldout", SIZES["heldout"], wording="known"),
        "unseen": writer.examples("unseen", SIZES["unseen"], wording="unseen"),
        "shuffled": writer.shuffled(train, SIZES["shuffled"]),
    }
    directory.mkdir(parents=True, exist_ok=True)
    paths = {name: directory / f"{name}.jsonl" for name in files}
    for name, examples in files.items():
        _write(paths[name], examples)
    return DemoData(**paths)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to write the files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = make_demo_data(arguments.directory, arguments.seed)
    for path in vars(data).values():
        print(path)  # noqa: T201 - the answer of a command line


if __name__ == "__main__":
    main()
