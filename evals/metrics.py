"""How a generated answer is scored. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

Metric = Literal["exact_match", "exact_match_json", "valid_format"]


def exact_match(answer: str, expected: str) -> bool:
    """The same text, white space around it aside."""
    return answer.strip() == expected.strip()


def exact_match_json(answer: str, expected: str) -> bool:
    """The same JSON value: order of keys and layout don't matter, anything beside the JSON does."""
    found, is_json = _parsed(answer)
    wanted, _ = _parsed(expected)
    return is_json and _canonical(found) == _canonical(wanted)


def valid_format(answer: str, required_keys: Sequence[str]) -> bool:
    """A JSON object, and nothing else, that has every required key."""
    found, _ = _parsed(answer)
    return isinstance(found, dict) and all(key in found for key in required_keys)


def scorer(metric: Metric, required_keys: Sequence[str]) -> Callable[[str, str], bool]:
    """The function of (answer, expected) that a metric's name stands for."""
    match metric:
        case "exact_match":
            return exact_match
        case "exact_match_json":
            return exact_match_json
        case "valid_format":
            return lambda answer, _: valid_format(answer, required_keys)


def _parsed(text: str) -> tuple[Any, bool]:
    try:
        return json.loads(text), True
    except (ValueError, RecursionError):
        return None, False


def _canonical(value: Any) -> str:
    """Tells true from 1 and 1 from "1", which Python's equality does not always."""
    return json.dumps(value, sort_keys=True)
