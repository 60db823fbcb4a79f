import json
from pathlib import Path
from typing import Any

import pytest

from evals.errors import SuiteInvalid
from evals.items import (
    ChatItem,
    Message,
    contamination,
    few_shot_turns,
    load_chat_items,
    load_cloze_items,
    with_examples,
)


def a_row(question: str = "Where is my parcel?", answer: str = "{}", system: str = "Answer in JSON.") -> dict[str, Any]:
    return {
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def a_file(folder: Path, *rows: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_the_last_turn_is_what_is_expected(tmp_path: Path) -> None:
    (item,) = load_chat_items(a_file(tmp_path, a_row(answer='{"intent": "refund"}')))

    assert item.expected == '{"intent": "refund"}'
    assert [message.role for message in item.prompt] == ["system", "user"]
    assert item.question == "Where is my parcel?"


def test_an_items_name_follows_from_its_question_alone(tmp_path: Path) -> None:
    one, other = (load_chat_items(a_file(tmp_path, a_row(answer=answer)))[0] for answer in ("a", "b"))
    third = load_chat_items(a_file(tmp_path, a_row("Something else?")))[0]

    assert one.id == other.id != third.id


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", ":2: not JSON"),
        ("[1]", ":2: a row must be a JSON object, got list"),
        ({"messages": []}, ":2: messages must end"),
        ({"messages": [{"role": "user", "content": "x"}]}, ":2: messages must end"),
        ({"messages": [{"role": "robot", "content": "x"}]}, ":2: a message is wrong"),
        ({"messages": [{"role": "user", "content": None}]}, ":2: a message is wrong"),
        (a_row("first"), ":2: the same question stands on an earlier line"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(tmp_path: Path, row: object, complaint: str) -> None:
    with pytest.raises(SuiteInvalid, match=complaint):
        load_chat_items(a_file(tmp_path, a_row("first"), row))


def test_few_shot_examples_are_drawn_with_the_seed(tmp_path: Path) -> None:
    path = a_file(tmp_path, *(a_row(f"question {i}", f"answer {i}") for i in range(20)))

    first, again, other = (few_shot_turns(path, k=4, seed=seed) for seed in (1, 1, 2))

    assert first == again != other
    assert [turn.role for turn in first] == ["user", "assistant"] * 4


def test_too_few_examples_are_told(tmp_path: Path) -> None:
    with pytest.raises(SuiteInvalid, match="has 1 rows, few_shot wants 4"):
        few_shot_turns(a_file(tmp_path, a_row()), k=4, seed=0)


def test_examples_stand_between_instructions_and_question() -> None:
    prompt = (Message(role="system", content="S"), Message(role="user", content="Q"))
    examples = (Message(role="user", content="q"), Message(role="assistant", content="a"))

    assert [m.content for m in with_examples(prompt, examples)] == ["S", "q", "a", "Q"]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer": 2}, "none of the 2 choices"),
        ({"choices": [" a"]}, "choices"),
        ({"choices": [" a", " a"]}, "repeat"),
        ({"prompt": ""}, "prompt"),
        ({"extra": 1}, "extra"),
        ({"id": "first"}, "stands on an earlier line"),
        ({"prompt": "Water is"}, "stands on an earlier line"),
    ],
)
def test_a_wrong_cloze_row_is_named_by_its_line(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    good = {"id": "first", "prompt": "Water is", "choices": [" wet", " dry"], "answer": 0}

    with pytest.raises(SuiteInvalid, match=f":2: .*{complaint}"):
        load_cloze_items(a_file(tmp_path, good, {**good, "id": "second", "prompt": "Fire is", **change}))


def test_contamination_finds_the_same_question_and_long_shared_runs(tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    training = a_file(tmp_path, a_row("Where is MY parcel, please?!"), a_row(f"hello {long} goodbye"))

    def item(question: str) -> ChatItem:
        return ChatItem(prompt=(Message(role="user", content=question),), expected="x")

    same, overlapping, free = (
        item("where is my parcel please"),
        item(f"so {long} then"),
        item("one two three four five"),
    )

    found = contamination([same, overlapping, free], [training])

    assert found.exact == {same.id}
    assert found.overlapping == {overlapping.id}


def test_the_systems_instructions_are_no_contamination(tmp_path: Path) -> None:
    instructions = " ".join(f"word{i}" for i in range(40))
    training = a_file(tmp_path, a_row("first question", system=instructions))
    (item,) = load_chat_items(a_file(tmp_path, a_row("second question", system=instructions), name="items.jsonl"))

    found = contamination([item], [training])

    assert not found.exact
    assert not found.overlapping
