"""What other programs say, before clients may read it."""

from __future__ import annotations

import pytest

from gateway.errors import without_internals


@pytest.mark.parametrize(
    "words",
    [
        "",
        "object at 0x7f3a21",
        "No adapter found for /srv/home/artifacts/ab",
        "cannot read C:\\models",
        "Traceback (most recent call last)",
        'File "x.py", line 3',
        "first line\nsecond line",
        "x" * 401,
    ],
)
def test_what_may_hold_internals_is_replaced(words: str) -> None:
    assert without_internals(words, "see the log") == "see the log"


def test_a_plain_sentence_is_kept() -> None:
    said = "LoRA rank 32 is greater than max_lora_rank 16."

    assert without_internals(said, "see the log") == said
