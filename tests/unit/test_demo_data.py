"""The demo's data is what it claims to be: enough of it, balanced, unseen where it says so, wrong where it says so."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from deploy.demo.data import SYSTEM_PROMPT, Answer, DemoData, make_demo_data
from deploy.demo.phrases import CUES, ITEMS, MATERIALS, PHRASINGS
from gateway.datasets.validation import check_files, validate_file

Row = tuple[str, Answer]


def rows(path: Path) -> list[Row]:
    found = []
    for line in path.read_text().splitlines():
        system, user, assistant = json.loads(line)["messages"]
        assert (system["role"], user["role"], assistant["role"]) == ("system", "user", "assistant")
        assert system["content"] == SYSTEM_PROMPT
        answer = Answer.model_validate_json(assistant["content"])
        assert answer.text() == assistant["content"]
        found.append((user["content"], answer))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return make_demo_data(tmp_path_factory.mktemp("demo"), 0)


def phrasing_of(email: str) -> str:
    """The one hand-written phrasing in an e-mail."""
    found = [
        phrasing
        for phrasings in PHRASINGS.values()
        for phrasing in (*phrasings.known, *phrasings.unseen)
        if re.search(
            re.escape(phrasing).replace(r"\{order\}", "[A-Z]{2}-[0-9]{3}").replace(r"\{product\}", "[a-z ]+?"), email
        )
    ]
    assert len(found) == 1, (email, found)
    return found[0]


def test_there_are_as_many_phrasings_as_promised_and_none_twice() -> None:
    every = [phrasing for found in PHRASINGS.values() for phrasing in (*found.known, *found.unseen)]

    assert all(len(found.known) >= 60 and len(found.unseen) >= 10 for found in PHRASINGS.values())
    assert len(set(every)) == len(every)
    assert all(phrasing.count("{order}") == phrasing.count("{product}") == 1 for phrasing in every)


def test_a_cue_stands_for_one_urgency_and_hides_in_no_phrasing() -> None:
    cues = [cue for found in CUES.values() for cue in found]
    text = " ".join(phrasing for found in PHRASINGS.values() for phrasing in (*found.known, *found.unseen))

    assert len(set(cues)) == len(cues)
    assert not [cue for cue in cues if cue in text]
    assert not [a for a in cues for b in cues if a != b and a in b]


def test_files_are_large_enough(data: DemoData) -> None:
    sizes = {name: len(rows(path)) for name, path in vars(data).items()}

    assert sizes["train"] >= 800
    assert sizes["validation"] == 100
    assert (sizes["heldout"], sizes["unseen"]) == (200, 120)
    assert sizes["shuffled"] == 320


def test_the_answer_is_in_the_mail(data: DemoData) -> None:
    for path in (data.train, data.validation, data.heldout, data.unseen):
        for email, answer in rows(path):
            assert answer.order in email
            assert answer.product in email
            assert [urgency for urgency, cues in CUES.items() if any(cue in email for cue in cues)] == [answer.urgency]
            found = PHRASINGS[answer.intent]
            assert phrasing_of(email) in (*found.known, *found.unseen)


def test_everything_is_balanced(data: DemoData) -> None:
    train = rows(data.train)
    phrasings = Counter(phrasing_of(email) for email, _ in train)

    for field in ("intent", "urgency"):
        counts = Counter(getattr(answer, field) for _, answer in train)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert set(phrasings) == {phrasing for found in PHRASINGS.values() for phrasing in found.known}
    assert max(phrasings.values()) - min(phrasings.values()) <= 1


def test_held_out_rows_have_new_entities_and_known_phrasings(data: DemoData) -> None:
    train, heldout = rows(data.train), rows(data.heldout)
    known = {phrasing_of(email) for email, _ in train}

    assert {phrasing_of(email) for email, _ in heldout} <= known
    assert not {answer.order for _, answer in train} & {answer.order for _, answer in heldout}
    assert not {answer.product for _, answer in train} & {answer.product for _, answer in heldout}
    assert not {email.splitlines()[1] for email, _ in train} & {email.splitlines()[1] for email, _ in heldout}


def test_every_word_of_a_held_out_product_was_seen_in_training(data: DemoData) -> None:
    trained = {answer.product for _, answer in rows(data.train)}

    assert {product.split(" ", 1)[0] for product in trained} == set(MATERIALS)
    assert {product.split(" ", 1)[1] for product in trained} == set(ITEMS)


def test_unseen_rows_have_phrasings_that_training_never_shows(data: DemoData) -> None:
    trained = {phrasing_of(email) for email, _ in rows(data.train) + rows(data.validation)}

    assert not {phrasing_of(email) for email, _ in rows(data.unseen)} & trained


def test_no_row_of_one_file_is_in_another(data: DemoData) -> None:
    emails = [email for path in (data.train, data.validation, data.heldout, data.unseen) for email, _ in rows(path)]

    assert len(set(emails)) == len(emails)


def test_shuffled_rows_are_training_mails_whose_well_formed_answers_are_all_wrong(data: DemoData) -> None:
    right = dict(rows(data.train))
    shuffled = rows(data.shuffled)

    assert {email for email, _ in shuffled} <= set(right)
    assert not [email for email, answer in shuffled if answer == right[email]]
    assert Counter(answer.order for _, answer in shuffled) == Counter(right[email].order for email, _ in shuffled)


def test_the_data_check_has_nothing_to_complain_of(data: DemoData) -> None:
    found = check_files(data.train, data.validation)

    assert found.is_valid
    assert found.leaked_rows == 0
    assert [validate_file(path).warning_count for path in vars(data).values()] == [0] * 5


def test_the_seed_decides_every_byte(data: DemoData, tmp_path: Path) -> None:
    again, other = make_demo_data(tmp_path / "again", 0), make_demo_data(tmp_path / "other", 1)

    for name, path in vars(data).items():
        assert path.read_bytes() == getattr(again, name).read_bytes()
        assert path.read_bytes() != getattr(other, name).read_bytes()
