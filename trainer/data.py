"""Chat rows as token ids and labels. Heavy: loads transformers.

A row is rendered by the base model's own chat template, once, as an engine renders it: with the default system prompt
that the template puts in when the row has none. Only what the assistant says is learned, up to and with the token that
ends its turn; the line break that templates write after that token is never generated, so it is not learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gateway.datasets.validation import read_rows, validate_file

from .errors import BadConfig, BadData
from .models import Dropped

IGNORED = -100
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Encoded:
    """One row; a label is the token itself, or `IGNORED`."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class ChatRows:
    """One file, encoded. `read` rows came in: `len(rows)` are trained on, and every other one is in `dropped`."""

    rows: list[Encoded]
    dropped: list[Dropped]
    read: int
    digest: str

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.input_ids) for row in self.rows)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The base model's tokenizer. Raises `BadConfig` when it cannot be trained with."""
    if not (path / "tokenizer.json").is_file():
        raise BadConfig(
            f"base_model {path} has no tokenizer.json: run `make base-model`, or set base_model", param="base_model"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    if tokenizer.chat_template is None:
        raise BadConfig(
            f"the tokenizer of {path} has no chat template; use an instruction-tuned base", param="base_model"
        )
    if tokenizer.eos_token_id is None:
        raise BadConfig(
            f"the tokenizer of {path} names no end token, so the end of a turn cannot be learned", param="base_model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_chat_rows(path: Path, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> ChatRows:
    """Read and encode a file of chat rows. Raises `BadData` that names the first wrong lines."""
    if not path.is_file():
        raise BadData(f"{path} does not exist", code="no_such_file")
    report = validate_file(path, special_tokens=tokenizer.all_special_tokens)
    if not report.is_valid:
        raise BadData(f"{path.name} cannot be trained on: {report.summary()}; `turnout data check` lists them all")
    rows: list[Encoded] = []
    dropped: list[Dropped] = []
    for line, messages in read_rows(path):
        found = encode_chat(messages, tokenizer, max_length=max_length)
        if isinstance(found, Encoded):
            rows.append(found)
        else:
            dropped.append(Dropped(line, found))
    if not rows:
        raise BadData(
            f"{path.name}: none of {report.rows} rows can be trained on; line {dropped[0].line}: {dropped[0].reason}"
        )
    if len(rows) + len(dropped) != report.rows:
        raise BadData(f"{path.name} changed while it was read: {report.rows} rows, then {len(rows) + len(dropped)}")
    return ChatRows(rows, dropped, read=report.rows, digest=report.digest)


def encode_chat(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Encoded | str:
    """Encode one conversation, or say why it cannot be learned from."""
    text = _render(messages, tokenizer)
    spans = _answer_spans(messages, text, tokenizer)
    if isinstance(spans, str):
        return spans
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoding["input_ids"]
    if len(ids) > max_length:
        return f"{len(ids)} tokens are more than max_length {max_length}"
    labels = [IGNORED] * len(ids)
    for index, (start, end) in enumerate(encoding["offset_mapping"]):
        for first, last in spans:
            if first <= start and end <= last:
                labels[index] = ids[index]
            elif start < first < end or start < last < end:
                return "an answer begins or ends in the middle of a token: remove the white space at its edges"
    return Encoded(ids, labels)


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, answer_next: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer_next))


def _answer_spans(messages: Messages, text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]] | str:
    """Where in the text each answer stands: from the end of its prompt to the end of its turn."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:index], tokenizer, answer_next=True)
        turn = _render(messages[: index + 1], tokenizer)
        if not turn.startswith(prompt) or not text.startswith(turn):
            return "the chat template renders this conversation differently at its end than on the way: give one answer a row"
        end = turn.rfind(tokenizer.eos_token)
        if end < len(prompt):
            return f"the chat template does not end an answer with {tokenizer.eos_token}, so its end cannot be learned"
        spans.append((len(prompt), end + len(tokenizer.eos_token)))
    return spans
