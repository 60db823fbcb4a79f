"""The items of a suite: read from JSONL, named by what they say, checked against training rows."""

from __future__ import annotations

import hashlib
import json
import random
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from .errors import SuiteInvalid

NGRAM = 13
MOST_CONTAMINATED = 0.05


class Message(BaseModel, frozen=True):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatItem(BaseModel, frozen=True):
    """A question (every turn but the last) and the expected answer (the last turn)."""

    prompt: tuple[Message, ...]
    expected: str

    @property
    def id(self) -> str:
        """Digest of the question: the same question is the same item in every set of scores."""
        return digest_of([message.model_dump() for message in self.prompt])

    @property
    def question(self) -> str:
        """What the user says, without the system's instructions, which all items share."""
        return "\n".join(message.content for message in self.prompt if message.role == "user")


class ClozeItem(BaseModel, frozen=True, extra="forbid"):
    """A prompt and the choices for its next token."""

    id: str
    prompt: str = Field(min_length=1)
    choices: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _points_at_a_choice(self) -> Self:
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is none of the {len(self.choices)} choices")
        if len(set(self.choices)) != len(self.choices):
            raise ValueError("choices repeat themselves")
        return self

    @property
    def key(self) -> str:
        """Digest of the question: scores are kept under it, whatever the item is called."""
        return digest_of([self.prompt, list(self.choices)])


class Contamination(BaseModel, frozen=True):
    """Items that training has seen: word for word, or in a run of 13 words."""

    exact: frozenset[str] = frozenset()
    overlapping: frozenset[str] = frozenset()


def digest_of(value: object) -> str:
    """sha256 over canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSONL file; blank lines are skipped."""
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise SuiteInvalid(f"{path}:{line}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise SuiteInvalid(f"{path}:{line}: a row must be a JSON object, got {type(row).__name__}")
            yield line, row


def load_chat_items(path: Path) -> tuple[ChatItem, ...]:
    """Chat JSONL: rows {"messages": [...]} that end with the assistant's expected answer."""
    items: dict[str, ChatItem] = {}
    for line, row in load_rows(path):
        item = _chat_item(path, line, row)
        if item.id in items:
            raise SuiteInvalid(f"{path}:{line}: the same question stands on an earlier line; remove one")
        items[item.id] = item
    return tuple(items.values())


def load_cloze_items(path: Path) -> tuple[ClozeItem, ...]:
    """JSONL rows {"id", "prompt", "choices", "answer"}; ids and prompts are distinct."""
    items: dict[str, ClozeItem] = {}
    prompts: set[str] = set()
    for line, row in load_rows(path):
        try:
            item = ClozeItem.model_validate(row)
        except ValidationError as error:
            fault = error.errors()[0]
            raise SuiteInvalid(f"{path}:{line}: {'.'.join(map(str, fault['loc']))} {fault['msg']}") from error
        if item.id in items or item.prompt in prompts:
            raise SuiteInvalid(
                f"{path}:{line}: id {item.id!r} or its prompt stands on an earlier line; make both distinct"
            )
        items[item.id] = item
        prompts.add(item.prompt)
    return tuple(items.values())


def few_shot_turns(path: Path, *, k: int, seed: int) -> tuple[Message, ...]:
    """Questions and answers of k rows, drawn with the seed, without their system turns."""
    items = load_chat_items(path)
    if len(items) < k:
        raise SuiteInvalid(f"{path} has {len(items)} rows, few_shot wants {k}")
    chosen = random.Random(seed).sample(items, k)  # noqa: S311
    return tuple(
        turn
        for item in chosen
        for turn in (*(m for m in item.prompt if m.role != "system"), Message(role="assistant", content=item.expected))
    )


def with_examples(prompt: Sequence[Message], examples: Sequence[Message]) -> tuple[Message, ...]:
    """The prompt with the examples after its system turn."""
    system = tuple(message for message in prompt if message.role == "system")
    rest = tuple(message for message in prompt if message.role != "system")
    return (*system, *examples, *rest)


def contamination(items: Iterable[ChatItem], training_files: Sequence[Path]) -> Contamination:
    """Which items the training rows give away: the same normalised question, or a shared run of 13 words."""
    questions: set[str] = set()
    grams: set[str] = set()
    for path in training_files:
        for line, row in load_rows(path):
            words = _words(_chat_item(path, line, row).question)
            questions.add(" ".join(words))
            grams.update(_grams(words))
    exact, overlapping = set(), set()
    for item in items:
        words = _words(item.question)
        if " ".join(words) in questions:
            exact.add(item.id)
        elif not grams.isdisjoint(_grams(words)):
            overlapping.add(item.id)
    return Contamination(exact=frozenset(exact), overlapping=frozenset(overlapping))


def _chat_item(path: Path, line: int, row: dict[str, Any]) -> ChatItem:
    try:
        messages = [Message.model_validate(message) for message in row.get("messages") or []]
    except ValidationError as error:
        raise SuiteInvalid(f"{path}:{line}: a message is wrong: {error.errors()[0]['msg']}") from error
    if len(messages) < 2 or messages[-1].role != "assistant" or messages[-2].role != "user":
        raise SuiteInvalid(f"{path}:{line}: messages must end with a user turn and the expected assistant turn")
    return ChatItem(prompt=tuple(messages[:-1]), expected=messages[-1].content)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def _grams(words: Sequence[str]) -> Iterator[str]:
    return (" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1))
