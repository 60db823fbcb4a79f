"""The forgetting checks' own arithmetic: which items a look asks, and what counts as right."""

from __future__ import annotations

import pytest

from evals.config import ClozeTask, ForgettingCheck
from evals.errors import SuiteInvalid
from evals.forgetting import _of_look, _right
from evals.items import ClozeItem
from evals.power import look_rule
from evals.scores import Answer, Fingerprint, ScoreSet

CHECK = ForgettingCheck(
    name="general", tasks=(ClozeTask(name="t0", data="t0.jsonl"),), margin=0.04, items=(3, 5), alpha=0.05
)
ITEM = ClozeItem(id="i", prompt="two and two is ", choices=("four", "five", "six"), answer=0)


def answered(*logprobs: float) -> ScoreSet:
    """The item, with these log-probabilities of its choices."""
    conditions = Fingerprint(backend="gateway", base_digest="a" * 64, engine="e", dtype="d", harness="h")
    return ScoreSet(
        target_digest="a" * 64, task="t0", task_digest="b" * 64, fingerprint=conditions,
        answers=(Answer(item=ITEM.key, logprobs=logprobs),),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("logprobs", "is_right"),
    [
        ((-1.0, -2.0, -3.0), True),
        ((-1.0, -1.0, -3.0), False),  # a tie knows nothing
        ((-1.0, -1.0, -1.0), False),
        ((-2.0, -3.0, -1.0), False),
    ],
)
def test_right_is_what_stands_above_every_other_choice(logprobs: tuple[float, ...], is_right: bool) -> None:
    assert _right([ITEM], answered(*logprobs)) == [is_right]


def test_the_larger_look_asks_more_and_all_that_the_first_asked() -> None:
    items = list(range(7))

    first, second = (_of_look(items, CHECK, look, "t0") for look in (1, 2))

    assert first == (0, 1, 2)
    assert second == (0, 1, 2, 3, 4)


def test_a_look_with_too_few_items_is_refused() -> None:
    with pytest.raises(SuiteInvalid, match="look 2 of check general takes 5"):
        _of_look(list(range(4)), CHECK, 2, "t0")


def test_both_looks_together_spend_what_the_suite_allows() -> None:
    assert 2 * look_rule(CHECK).alpha == CHECK.alpha
