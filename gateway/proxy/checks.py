"""Whether one field of a request holds what it may; each check gives back what is forwarded, or names what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import Invalid, quoted

MAX_N = 8
MAX_STOPS = 8
MAX_STOP_CHARS = 1_000
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_LABELS = 128
MAX_PROMPTS = 64
MAX_MESSAGES = 2_048
MAX_MESSAGE_FIELDS = 32  # an answer that is sent back has a dozen, most of them null
MAX_PARTS = 1_024
MAX_METADATA = 16
MAX_STICKY_CHARS = 512
INT64 = 2**63
_ROLES = frozenset({"system", "developer", "user", "assistant"})
_MESSAGE_FIELDS = frozenset({"role", "content", "name"})


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the served base model sets limits by."""

    vocab_size: int
    max_model_len: int


Check = Callable[[str, Any, Bounds], Any]


def fail(name: str, value: Any, allowed: str) -> Invalid:
    """The error that names a field, its value, and what is allowed."""
    return Invalid(f"`{name}` is {quoted(value)}; it must be {allowed}", code="invalid_value", param=name)


def too_many(name: str, value: list[Any] | dict[str, Any], things: str, most: int) -> Invalid:
    """The error of a list or an object that is longer than may be; none of its elements is looked at."""
    return Invalid(f"`{name}` has {len(value):,} {things}; at most {most:,} are taken", code="too_many", param=name)


def boolean(name: str, value: Any, bounds: Bounds) -> bool:
    """True or false, and nothing that Python takes for them."""
    if value is True or value is False:
        return value
    raise fail(name, value, "true or false")


def number(low: float, high: float, *, above: bool = False) -> Check:
    """A number within bounds."""
    allowed = f"a number {'above' if above else 'from'} {low} to {high}"

    def check(name: str, value: Any, bounds: Bounds) -> float:
        if type(value) in (int, float) and (low < value if above else low <= value) and value <= high:
            return value  # type: ignore[no-any-return]
        raise fail(name, value, allowed)

    return check


def integer(low: int, high: int) -> Check:
    """An integer within bounds."""

    def check(name: str, value: Any, bounds: Bounds) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise fail(name, value, f"an integer from {low} to {high}")

    return check


def max_tokens(name: str, value: Any, bounds: Bounds) -> int:
    """Tokens to make, up to the model's length."""
    return integer(1, bounds.max_model_len)(name, value, bounds)  # type: ignore[no-any-return]


def top_k(name: str, value: Any, bounds: Bounds) -> int:
    """How many tokens to draw from; -1 for all."""
    return integer(-1, bounds.vocab_size)(name, value, bounds)  # type: ignore[no-any-return]


def stop(name: str, value: Any, bounds: Bounds) -> Any:
    """Where to stop."""
    stops = value if isinstance(value, list) else [value]
    if len(stops) <= MAX_STOPS and all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        return value
    raise fail(name, value, f"a string or up to {MAX_STOPS} strings, each of 1 to {MAX_STOP_CHARS} characters")


def logit_bias(name: str, value: Any, bounds: Bounds) -> Any:
    """Biases of tokens that exist."""
    allowed = f"up to {MAX_LOGIT_BIAS} token ids below {bounds.vocab_size}, each with a number from -100 to 100"
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise fail(name, value, allowed)
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < bounds.vocab_size):
            raise fail(f"{name}.{token[:40]}", bias, allowed)
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise fail(f"{name}.{token}", bias, allowed)
    return value


def labels(name: str, value: Any, bounds: Bounds) -> Any:
    """Tokens to score."""
    if isinstance(value, list) and 0 < len(value) <= MAX_LABELS and _are_token_ids(value, bounds):
        return value
    raise fail(name, value, f"1 to {MAX_LABELS} token ids below {bounds.vocab_size}")


def _are_token_ids(value: list[Any], bounds: Bounds) -> bool:
    return {int} == set(map(type, value)) and min(value) >= 0 and max(value) < bounds.vocab_size


def prompt(name: str, value: Any, bounds: Bounds) -> Any:
    """Text, token ids, or a list of either."""
    if isinstance(value, str):
        return _one_prompt(name, value, bounds)
    if not isinstance(value, list) or not value:
        raise fail(name, value, f"text, token ids below {bounds.vocab_size}, or a list of either")
    if type(value[0]) is int:
        return _one_prompt(name, value, bounds)
    if len(value) > MAX_PROMPTS:
        raise too_many(name, value, "prompts", MAX_PROMPTS)
    if len({type(item) for item in value}) != 1:
        raise fail(name, value, "all text or all token ids")
    return [_one_prompt(f"{name}[{place}]", item, bounds) for place, item in enumerate(value)]


def _one_prompt(name: str, value: Any, bounds: Bounds) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        if len(value) > bounds.max_model_len:
            raise too_many(name, value, "tokens", bounds.max_model_len)
        if not _are_token_ids(value, bounds):
            raise fail(name, value, f"token ids from 0 to {bounds.vocab_size - 1}")
        return value
    raise fail(name, value, "not empty: text, or token ids")


def messages(name: str, value: Any, bounds: Bounds) -> list[dict[str, Any]]:
    """A chat of text."""
    if not isinstance(value, list) or not value:
        raise fail(name, value, "a list of at least one message")
    if len(value) > MAX_MESSAGES:
        raise too_many(name, value, "messages", MAX_MESSAGES)
    return [_message(f"{name}[{place}]", message) for place, message in enumerate(value)]


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise fail(name, message, "an object with `role` and `content`")
    if len(message) > MAX_MESSAGE_FIELDS:
        raise too_many(name, message, "fields", MAX_MESSAGE_FIELDS)
    # An answer of an SDK that is sent back carries `"refusal": null`, `"tool_calls": []` and the like.
    said = {
        key: value for key, value in message.items() if value is not None and (key in _MESSAGE_FIELDS or value != [])
    }
    unknown = said.keys() - _MESSAGE_FIELDS
    if unknown:
        raise Invalid(
            f"`{name}.{min(unknown)[:60]}` is not supported: a message has `role`, `content` and `name`",
            code="unsupported_parameter",
            param=f"{name}.{min(unknown)[:60]}",
        )
    role = said.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise fail(f"{name}.role", message.get("role"), f"one of {', '.join(sorted(_ROLES))}")
    if "name" in said and not (isinstance(said["name"], str) and 0 < len(said["name"]) <= 64):
        raise fail(f"{name}.name", said["name"], "1 to 64 characters")
    said["content"] = _content(f"{name}.content", said.get("content"))
    return said


def _content(name: str, content: Any) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise fail(name, content, "text, or a list of text parts")
    if len(content) > MAX_PARTS:
        raise too_many(name, content, "parts", MAX_PARTS)
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise Invalid(
                f'`{name}[{place}]` is of type {quoted(kind)}: only text is served; send `{{"type": "text", "text": ...}}`',
                code="unsupported_content",
                param=f"{name}[{place}]",
            )
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise fail(f"{name}[{place}]", part, "an object with exactly `type` and `text`")
    return content


def metadata(name: str, value: Any, bounds: Bounds) -> Any:
    """Labels of the client."""
    if isinstance(value, dict) and len(value) <= MAX_METADATA and all(isinstance(item, str) for item in value.values()):
        return value
    raise fail(name, value, f"an object of at most {MAX_METADATA} strings")


def sticky(name: str, value: Any, bounds: Bounds) -> str:
    """Who asks."""
    if isinstance(value, str) and 0 < len(value) <= MAX_STICKY_CHARS:
        return value
    raise fail(name, value, f"1 to {MAX_STICKY_CHARS} characters")


penalty = number(-2, 2)
