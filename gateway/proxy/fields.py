"""What a completion request may hold. The engine gets a body rebuilt from these lists, never the client's own.

A field is forwarded, read by the gateway, set by the gateway, for evaluators only, or refused with a reason; a field on
no list is refused by name. A test holds these lists against the request models of the installed engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import Forbidden, Invalid

Endpoint = Literal["chat", "completions"]

MAX_N = 8
MAX_STOPS = 8
MAX_STOP_CHARS = 1_000
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_LABELS = 128
MAX_PROMPTS = 64
MAX_STICKY_CHARS = 512
_INT64 = 2**63
_ROLES = frozenset({"system", "developer", "user", "assistant"})
_MESSAGE_FIELDS = frozenset({"role", "content", "name"})


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the served base model sets limits by."""

    vocab_size: int
    max_model_len: int


@dataclass(slots=True)
class CompletionRequest:
    """A checked request: what the engine gets, and what the gateway keeps to itself."""

    model: str
    forwarded: dict[str, Any]
    is_stream: bool
    wants_usage: bool
    sticky: str | None


Check = Callable[[str, Any, Bounds], Any]


def _fail(name: str, value: Any, allowed: str) -> Invalid:
    return Invalid(f"`{name}` is {_short(value)}; it must be {allowed}", code="invalid_value", param=name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _boolean(name: str, value: Any, bounds: Bounds) -> bool:
    if value is True or value is False:
        return value
    raise _fail(name, value, "true or false")


def _number(low: float, high: float, *, above: bool = False) -> Check:
    allowed = f"a number {'above' if above else 'from'} {low} to {high}"

    def check(name: str, value: Any, bounds: Bounds) -> float:
        if type(value) in (int, float) and (low < value if above else low <= value) and value <= high:
            return value  # type: ignore[no-any-return]
        raise _fail(name, value, allowed)

    return check


def _integer(low: int, high: int) -> Check:
    def check(name: str, value: Any, bounds: Bounds) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise _fail(name, value, f"an integer from {low} to {high}")

    return check


def _max_tokens(name: str, value: Any, bounds: Bounds) -> int:
    return _integer(1, bounds.max_model_len)(name, value, bounds)  # type: ignore[no-any-return]


def _top_k(name: str, value: Any, bounds: Bounds) -> int:
    return _integer(-1, bounds.vocab_size)(name, value, bounds)  # type: ignore[no-any-return]


def _stop(name: str, value: Any, bounds: Bounds) -> Any:
    stops = value if isinstance(value, list) else [value]
    if len(stops) <= MAX_STOPS and all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        return value
    raise _fail(name, value, f"a string or up to {MAX_STOPS} strings, each of 1 to {MAX_STOP_CHARS} characters")


def _logit_bias(name: str, value: Any, bounds: Bounds) -> Any:
    allowed = f"up to {MAX_LOGIT_BIAS} token ids below {bounds.vocab_size}, each with a number from -100 to 100"
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise _fail(name, value, allowed)
    for token, bias in value.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < bounds.vocab_size):
            raise _fail(f"{name}.{token[:40]}", bias, allowed)
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise _fail(f"{name}.{token}", bias, allowed)
    return value


def _labels(name: str, value: Any, bounds: Bounds) -> Any:
    if isinstance(value, list) and 0 < len(value) <= MAX_LABELS and _are_token_ids(value, bounds):
        return value
    raise _fail(name, value, f"1 to {MAX_LABELS} token ids below {bounds.vocab_size}")


def _are_token_ids(value: list[Any], bounds: Bounds) -> bool:
    return {int} == set(map(type, value)) and min(value) >= 0 and max(value) < bounds.vocab_size


def _prompt(name: str, value: Any, bounds: Bounds) -> Any:
    if isinstance(value, str):
        return _one_prompt(name, value, bounds)
    if not isinstance(value, list) or not value:
        raise _fail(name, value, f"text, token ids below {bounds.vocab_size}, or a list of either")
    if type(value[0]) is int:
        return _one_prompt(name, value, bounds)
    if len(value) > MAX_PROMPTS:
        raise _fail(name, f"{len(value)} prompts", f"at most {MAX_PROMPTS} prompts")
    if len({type(item) for item in value}) != 1:
        raise _fail(name, value, "all text or all token ids")
    return [_one_prompt(f"{name}[{place}]", item, bounds) for place, item in enumerate(value)]


def _one_prompt(name: str, value: Any, bounds: Bounds) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        if not _are_token_ids(value, bounds):
            raise _fail(name, value, f"token ids from 0 to {bounds.vocab_size - 1}")
        if len(value) > bounds.max_model_len:
            raise _fail(name, f"{len(value)} tokens", f"at most {bounds.max_model_len} tokens")
        return value
    raise _fail(name, value, "not empty: text, or token ids")


def _messages(name: str, value: Any, bounds: Bounds) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _fail(name, value, "a list of at least one message")
    return [_message(f"{name}[{place}]", message) for place, message in enumerate(value)]


def _message(name: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _fail(name, message, "an object with `role` and `content`")
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
    if said.get("role") not in _ROLES:
        raise _fail(f"{name}.role", message.get("role"), f"one of {', '.join(sorted(_ROLES))}")
    if "name" in said and not (isinstance(said["name"], str) and 0 < len(said["name"]) <= 64):
        raise _fail(f"{name}.name", said["name"], "1 to 64 characters")
    said["content"] = _content(f"{name}.content", said.get("content"))
    return said


def _content(name: str, content: Any) -> Any:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _fail(name, content, "text, or a list of text parts")
    for place, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise Invalid(
                f'`{name}[{place}]` is of type {_short(kind)}: only text is served; send `{{"type": "text", "text": ...}}`',
                code="unsupported_content",
                param=f"{name}[{place}]",
            )
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise _fail(f"{name}[{place}]", part, "an object with exactly `type` and `text`")
    return content


def _metadata(name: str, value: Any, bounds: Bounds) -> Any:
    if isinstance(value, dict) and len(value) <= 16 and all(isinstance(item, str) for item in value.values()):
        return value
    raise _fail(name, value, "an object of at most 16 strings")


def _sticky(name: str, value: Any, bounds: Bounds) -> str:
    if isinstance(value, str) and 0 < len(value) <= MAX_STICKY_CHARS:
        return value
    raise _fail(name, value, f"1 to {MAX_STICKY_CHARS} characters")


_penalty = _number(-2, 2)

# ---- The lists. ----------------------------------------------------------------------------------------------------

_FORWARDED: dict[str, Check] = {
    "max_tokens": _max_tokens,
    "temperature": _number(0, 2),
    "top_p": _number(0, 1, above=True),
    "top_k": _top_k,
    "min_p": _number(0, 1),
    "n": _integer(1, MAX_N),
    "stop": _stop,
    "seed": _integer(-_INT64, _INT64 - 1),
    "presence_penalty": _penalty,
    "frequency_penalty": _penalty,
    "repetition_penalty": _number(0, 2, above=True),
    "logit_bias": _logit_bias,
}

FORWARDED: dict[Endpoint, dict[str, Check]] = {
    "chat": _FORWARDED
    | {
        "messages": _messages,
        "max_completion_tokens": _max_tokens,
        "logprobs": _boolean,
        "top_logprobs": _integer(0, MAX_LOGPROBS),
    },
    "completions": _FORWARDED | {"prompt": _prompt, "logprobs": _integer(0, MAX_LOGPROBS)},
}

# Rewritten on the way: the client's name becomes the engine's, and usage is always asked for.
REWRITTEN = frozenset({"model", "stream", "stream_options"})

READ: dict[str, Check] = {"user": _sticky, "safety_identifier": _sticky, "metadata": _metadata}

SET_BY_GATEWAY = frozenset({"cache_salt", "priority", "request_id"})

EVALUATORS_ONLY: dict[str, Check] = {"logprob_token_ids": _labels, "return_tokens_as_token_ids": _boolean}

_KILLS = "it makes the engine score the prompt, which can stop it for everyone"
_TEMPLATE = "the template of the base model is fixed, and one from a request could run code or block the engine"
_LOADS = "it hands raw data to the engine's loaders"
_INTERNAL = "it reaches into the engine"
_MEDIA = "only text is served"
_BEAM = "beam search is not served"
_TOOLS = "tool calls are not served yet"
_SCHEMA = "constrained output is not served yet; a hostile schema can block the engine"
_REASONING = "the base models served have no reasoning mode"
_TOKENS = "control of single tokens beyond `logit_bias` and `stop` is not served"
_PROMPT = "prompts reach the model whole and as they are"
_OPENAI = "this part of OpenAI's API is not served"

REFUSED: dict[str, str] = {
    "prompt_logprobs": _KILLS,
    "echo": _KILLS,
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "documents": _TEMPLATE,
    "add_generation_prompt": _TEMPLATE,
    "continue_final_message": _TEMPLATE,
    "prompt_embeds": _LOADS,
    "kv_transfer_params": _INTERNAL,
    "ec_transfer_params": _INTERNAL,
    "vllm_xargs": _INTERNAL,
    "logits_processors": _INTERNAL,
    "session_id": _INTERNAL,
    "routed_experts_prompt_start": _INTERNAL,
    "stream_interval": _INTERNAL,
    "repetition_detection": _INTERNAL,
    "watermarking": _INTERNAL,
    "return_token_ids": _INTERNAL,
    "return_token_offsets": _INTERNAL,
    "return_prompt_text": _INTERNAL,
    "mm_processor_kwargs": _MEDIA,
    "media_io_kwargs": _MEDIA,
    "mm_payload": _MEDIA,
    "return_mm_kwargs": _MEDIA,
    "modalities": _MEDIA,
    "audio": _MEDIA,
    "use_beam_search": _BEAM,
    "best_of": _BEAM,
    "length_penalty": _BEAM,
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "parallel_tool_calls": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "response_format": _SCHEMA,
    "structured_outputs": _SCHEMA,
    "guided_json": _SCHEMA,
    "guided_regex": _SCHEMA,
    "guided_choice": _SCHEMA,
    "guided_grammar": _SCHEMA,
    "reasoning_effort": _REASONING,
    "include_reasoning": _REASONING,
    "thinking_token_budget": _REASONING,
    "stop_token_ids": _TOKENS,
    "include_stop_str_in_output": _TOKENS,
    "ignore_eos": _TOKENS,
    "min_tokens": _TOKENS,
    "skip_special_tokens": _TOKENS,
    "spaces_between_special_tokens": _TOKENS,
    "allowed_token_ids": _TOKENS,
    "bad_words": _TOKENS,
    "truncate_prompt_tokens": _PROMPT,
    "truncation_side": _PROMPT,
    "add_special_tokens": _PROMPT,
    "suffix": _PROMPT,
    "store": _OPENAI,
    "service_tier": _OPENAI,
    "prediction": _OPENAI,
    "web_search_options": _OPENAI,
    "verbosity": _OPENAI,
    "prompt_cache_key": _OPENAI,
    "moderation": _OPENAI,
}

REFUSED_PREFIXES: dict[str, str] = {"lora_": "adapters are chosen by `model` and by nothing else"}

# Values that ask for what happens anyway: clients that spell out defaults are not turned away.
_ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "use_beam_search": (False,),
    "best_of": (1,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


def read_request(
    endpoint: Endpoint, body: Any, bounds: Bounds, *, is_evaluator: bool, sticky: str | None = None
) -> CompletionRequest:
    """Check every field and rebuild the body. `sticky` is the header's key, which wins over the body's.

    Raises `Invalid` that names the first field that is wrong, and what is allowed.
    """
    if not isinstance(body, dict):
        raise Invalid("the body must be a JSON object", code="invalid_body")
    given = {name: value for name, value in body.items() if value is not None}
    checks = FORWARDED[endpoint]
    forwarded: dict[str, Any] = {}
    read: dict[str, Any] = {}
    for name, value in given.items():
        check = checks.get(name)
        if check is not None:
            forwarded[name] = check(name, value, bounds)
        elif name in READ:
            read[name] = READ[name](name, value, bounds)
        elif name not in REWRITTEN and not _asks_nothing(name, value):
            forwarded[name] = _special(name, value, bounds, is_evaluator=is_evaluator)
    _check_together(endpoint, given)
    is_stream = _boolean("stream", given.get("stream", False), bounds)
    wants_usage = _wants_usage(given.get("stream_options"), bounds, is_stream=is_stream)
    if is_stream:
        forwarded["stream"] = True
        forwarded["stream_options"] = {"include_usage": True}
    if sticky is None:
        sticky = read.get("safety_identifier") or read.get("user")
    return CompletionRequest(_model(given), forwarded, is_stream, wants_usage, sticky)


def _special(name: str, value: Any, bounds: Bounds, *, is_evaluator: bool) -> Any:
    """The value of a field that only evaluators may set; an error for every other field."""
    if name in EVALUATORS_ONLY:
        if not is_evaluator:
            raise Forbidden(f"`{name}` is for evaluations only; it needs a key with scope 'evaluate'", param=name)
        return EVALUATORS_ONLY[name](name, value, bounds)
    if name in SET_BY_GATEWAY:
        raise Invalid(f"`{name}` is set by the gateway; leave it out", code="unsupported_parameter", param=name)
    reason = REFUSED.get(name) or next(
        (why for prefix, why in REFUSED_PREFIXES.items() if name.startswith(prefix)), None
    )
    if reason is not None:
        raise Invalid(f"`{name[:60]}` is not supported: {reason}", code="unsupported_parameter", param=name[:60])
    raise Invalid(f"unknown field `{name[:60]}`; leave it out", code="unknown_parameter", param=name[:60])


def _asks_nothing(name: str, value: Any) -> bool:
    # `1 == True` in Python; the type decides too.
    return any(type(value) is type(idle) and value == idle for idle in _ASKS_NOTHING.get(name, ()))


def _check_together(endpoint: Endpoint, given: dict[str, Any]) -> None:
    subject = "messages" if endpoint == "chat" else "prompt"
    if subject not in given:
        raise Invalid(f"`{subject}` is missing", code="missing_parameter", param=subject)
    if "logprob_token_ids" in given and not given.get("logprobs"):
        raise Invalid("`logprob_token_ids` needs `logprobs`", code="invalid_value", param="logprob_token_ids")
    if "top_logprobs" in given and given.get("logprobs") is not True:
        raise Invalid("`top_logprobs` needs `logprobs: true`", code="invalid_value", param="top_logprobs")


def _model(given: dict[str, Any]) -> str:
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise Invalid(
            "`model` is missing: name a route, a version such as `support@3`, or the base model; `GET /v1/models` lists them",
            code="missing_model",
            param="model",
        )
    return model


def _wants_usage(options: Any, bounds: Bounds, *, is_stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise _fail("stream_options", options, "an object")
    if not is_stream:
        raise Invalid("`stream_options` needs `stream: true`", code="invalid_value", param="stream_options")
    unknown = options.keys() - {"include_usage", "include_obfuscation"}
    if unknown:
        name = f"stream_options.{min(unknown)[:60]}"
        raise Invalid(f"unknown field `{name}`; leave it out", code="unknown_parameter", param=name)
    return _boolean("stream_options.include_usage", options.get("include_usage") or False, bounds)
