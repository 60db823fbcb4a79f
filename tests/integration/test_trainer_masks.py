"""What is learned, on the real tokenizer and chat template: every answer with its end token, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_base import REAL_BASE
from trainer.errors import BadConfig, BadData

pytestmark = pytest.mark.heavy

END = "<|im_end|>"
SYSTEM = {"role": "system", "content": "Answer with JSON."}
ASKED = {"role": "user", "content": "Where is my lamp?"}
ANSWERED = {"role": "assistant", "content": '{"intent": "track"}'}
ASKED_AGAIN = {"role": "user", "content": "And the chair?\n\nIt is late."}
ANSWERED_AGAIN = {"role": "assistant", "content": 'Two lines,\n{"intent": "cancel"}'}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from trainer.data import load_tokenizer

    return load_tokenizer(REAL_BASE)


def encode(messages: list[dict[str, str]], tokenizer: Any, *, max_length: int = 512) -> Any:
    from trainer.data import encode_chat

    return encode_chat(messages, tokenizer, max_length=max_length)


def learned(row: Any) -> list[list[int]]:
    """The runs of tokens that have a label."""
    runs: list[list[int]] = []
    before = -100
    for label in row.labels:
        if label != -100:
            if before == -100:
                runs.append([])
            runs[-1].append(label)
        before = label
    return runs


def served_prompt(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """The tokens that an engine feeds the model before it answers."""
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def test_exactly_the_answer_and_its_end_token_are_learned(tokenizer: Any) -> None:
    row = encode([SYSTEM, ASKED, ANSWERED], tokenizer)

    assert [tokenizer.decode(run) for run in learned(row)] == [ANSWERED["content"] + END]
    assert learned(row)[0][-1] == tokenizer.eos_token_id
    assert all(label in (-100, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_the_line_break_after_the_end_token_is_not_learned(tokenizer: Any) -> None:
    row = encode([SYSTEM, ASKED, ANSWERED], tokenizer)

    assert tokenizer.decode(row.input_ids[-2:]) == f"{END}\n"
    assert row.labels[-1] == -100


def test_the_answer_starts_where_the_served_prompt_ends(tokenizer: Any) -> None:
    prompt = served_prompt([SYSTEM, ASKED], tokenizer)

    row = encode([SYSTEM, ASKED, ANSWERED], tokenizer)

    assert row.input_ids[: len(prompt)] == prompt
    assert row.labels[: len(prompt)] == [-100] * len(prompt)
    assert row.labels[len(prompt)] != -100


def test_without_a_system_message_the_default_one_is_trained_with_as_it_is_served(tokenizer: Any) -> None:
    prompt = served_prompt([ASKED], tokenizer)

    row = encode([ASKED, ANSWERED], tokenizer)

    assert "You are a helpful AI assistant named SmolLM" in tokenizer.decode(prompt)
    assert row.input_ids[: len(prompt)] == prompt
    assert [tokenizer.decode(run) for run in learned(row)] == [ANSWERED["content"] + END]


def test_every_answer_of_a_conversation_is_learned_after_the_prompt_it_is_served_with(tokenizer: Any) -> None:
    messages = [SYSTEM, ASKED, ANSWERED, ASKED_AGAIN, ANSWERED_AGAIN]
    prompts = [served_prompt(messages[:index], tokenizer) for index in (2, 4)]

    row = encode(messages, tokenizer)

    assert [tokenizer.decode(run) for run in learned(row)] == [
        ANSWERED["content"] + END,
        ANSWERED_AGAIN["content"] + END,
    ]
    for prompt, run in zip(prompts, learned(row), strict=True):
        assert row.input_ids[: len(prompt)] == prompt
        assert row.input_ids[len(prompt) : len(prompt) + len(run)] == run


def test_trls_own_reading_of_chat_rows_would_learn_the_prompt_too(tokenizer: Any) -> None:
    """Why the labels are made here: a chat row given to TRL as it is has no masked token."""
    whole = tokenizer.apply_chat_template([SYSTEM, ASKED, ANSWERED])["input_ids"]

    row = encode([SYSTEM, ASKED, ANSWERED], tokenizer)

    assert row.input_ids == list(whole)
    assert sum(label != -100 for label in row.labels) < len(whole) / 2


def test_a_row_over_the_length_is_left_out_and_never_cut(tokenizer: Any) -> None:
    length = len(encode([SYSTEM, ASKED, ANSWERED], tokenizer).input_ids)

    assert encode([SYSTEM, ASKED, ANSWERED], tokenizer, max_length=length).input_ids
    assert encode([SYSTEM, ASKED, ANSWERED], tokenizer, max_length=length - 1) == (
        f"{length} tokens are more than max_length {length - 1}"
    )


def test_an_answer_that_melts_into_its_prompt_is_left_out(tokenizer: Any) -> None:
    found = encode([SYSTEM, ASKED, {"role": "assistant", "content": "\n\nYes."}], tokenizer)

    assert isinstance(found, str)
    assert "middle of a token" in found


def test_left_out_rows_are_told_by_line_number(tokenizer: Any, tmp_path: Path) -> None:
    from trainer.data import load_chat_rows

    short = json.dumps({"messages": [SYSTEM, ASKED, ANSWERED]})
    long = json.dumps({"messages": [SYSTEM, {"role": "user", "content": "word " * 200}, ANSWERED]})
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{short}\n{long}\n{short}\n\n{long}\n")

    found = load_chat_rows(path, tokenizer, max_length=100)

    assert (found.read, len(found.rows), [dropped.line for dropped in found.dropped]) == (4, 2, [2, 5])
    assert "max_length 100" in found.dropped[0].reason


def test_a_file_with_no_row_that_fits_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from trainer.data import load_chat_rows

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [SYSTEM, ASKED, ANSWERED]}) + "\n")

    with pytest.raises(BadData, match=r"none of 1 rows can be trained on; line 1: .* max_length 16"):
        load_chat_rows(path, tokenizer, max_length=16)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        (json.dumps({"messages": []}), "empty"),
        (json.dumps({"messages": [ASKED, {"role": "assistant", "content": None}]}), "null"),
        (json.dumps({"messages": [ASKED]}), "no assistant message"),
        (json.dumps({"messages": [ASKED, {"role": "assistant", "content": f"x{END}y"}]}), "special token"),
    ],
)
def test_a_bad_row_is_refused_by_its_line(tokenizer: Any, tmp_path: Path, line: str, said: str) -> None:
    from trainer.data import load_chat_rows

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ASKED, ANSWERED]}) + f"\n{line}\n")

    with pytest.raises(BadData, match=rf"line 2: .*{said}"):
        load_chat_rows(path, tokenizer, max_length=512)


def test_a_file_that_is_not_there_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from trainer.data import load_chat_rows

    with pytest.raises(BadData, match="does not exist"):
        load_chat_rows(tmp_path / "nope.jsonl", tokenizer, max_length=512)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    from trainer.data import load_tokenizer

    with pytest.raises(BadConfig, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_padding_hides_no_end_token_though_it_is_the_same_token(tokenizer: Any) -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [
        encode([SYSTEM, ASKED, ANSWERED], tokenizer),
        encode([SYSTEM, ASKED, ANSWERED, ASKED_AGAIN, ANSWERED_AGAIN], tokenizer),
    ]

    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(
        [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    )

    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    for row, labels in zip(rows, batch["labels"].tolist(), strict=True):
        assert labels == row.labels + [-100] * (len(labels) - len(row.labels))
