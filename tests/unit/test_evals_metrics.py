import pytest

from evals.metrics import exact_match, exact_match_json, scorer, valid_format

KEYS = ("intent", "order_id")


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [("yes", "yes", True), (" yes\n", "yes", True), ("Yes", "yes", False), ("yes.", "yes", False), ("", "yes", False)],
)
def test_exact_match(answer: str, expected: str, right: bool) -> None:
    assert exact_match(answer, expected) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"intent": "refund", "order_id": "12"}', True),
        ('{"order_id":"12","intent":"refund"}', True),
        ('\n{"order_id":"12",\n "intent":"refund"}\n', True),
        ('{"intent": "refund", "order_id": 12}', False),
        ('{"intent": "refund"}', False),
        ('{"intent": "refund", "order_id": "12", "x": 1}', False),
        ('Sure! {"intent": "refund", "order_id": "12"}', False),
        ('{"intent": "refund", "order_id": "12"', False),
        ("null", False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_exact_match_of_json(answer: str, right: bool) -> None:
    assert exact_match_json(answer, '{"intent": "refund", "order_id": "12"}') is right


def test_true_is_not_one_in_json() -> None:
    assert not exact_match_json('{"a": true}', '{"a": 1}')


def test_an_answer_that_is_no_json_is_not_right_when_null_is_expected() -> None:
    assert not exact_match_json("oops", "null")
    assert exact_match_json(" null ", "null")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"intent": 1, "order_id": null}', True),
        ('{"intent": 1, "order_id": 2, "more": 3}', True),
        ('{"intent": 1}', False),
        ("[]", False),
        ('"intent order_id"', False),
        ('```json\n{"intent": 1, "order_id": 2}\n```', False),
    ],
)
def test_valid_format(answer: str, right: bool) -> None:
    assert valid_format(answer, KEYS) is right


def test_each_metric_has_its_function() -> None:
    assert scorer("exact_match", ())("a", "a")
    assert scorer("exact_match_json", ())('{"a":1}', '{"a": 1}')
    assert scorer("valid_format", ("a",))('{"a":1}', "whatever")
