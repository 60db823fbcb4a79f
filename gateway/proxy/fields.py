"""What a completion request may hold. The engine gets a body rebuilt from these lists, never the client's own.

A field is forwarded, read by the gateway, set by the gateway, for evaluators only, or refused with a reason; a field on
no list is refused by name. A test holds these lists against the request models of the installed engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import orjson

from ..errors import Forbidden, Invalid, NotFound, quoted
from .checks import (
    INT64,
    MAX_LOGPROBS,
    MAX_N,
    Bounds,
    Check,
    boolean,
    fail,
    integer,
    labels,
    logit_bias,
    max_tokens,
    messages,
    metadata,
    number,
    penalty,
    prompt,
    sticky,
    stop,
    top_k,
)

Endpoint = Literal["chat", "completions"]
MAX_FIELDS = 128
MAX_MODEL_CHARS = 200
_STREAM_OPTIONS = frozenset({"include_usage", "include_obfuscation"})


@dataclass(frozen=True, slots=True)
class Asked:
    """What decides how a body is read, beside the body."""

    endpoint: Endpoint
    bounds: Bounds
    is_evaluator: bool
    sticky: str | None = None
    """The header's key, which wins over the body's."""


@dataclass(frozen=True, slots=True)
class RebuiltRequest:
    """A checked request as the hot path passes it on: small, however large its prompt is, but for `opening`."""

    model: str
    is_stream: bool
    wants_usage: bool
    sticky: str | None
    opening: bytes
    """What the engine gets, but for the closing brace: what only the gateway knows follows."""


@dataclass(slots=True)
class CompletionRequest:
    """A checked request: what the engine gets, and what the gateway keeps to itself."""

    model: str
    forwarded: dict[str, Any]
    is_stream: bool
    wants_usage: bool
    sticky: str | None


# ---- The lists. ----------------------------------------------------------------------------------------------------

_FORWARDED: dict[str, Check] = {
    "max_tokens": max_tokens,
    "temperature": number(0, 2),
    "top_p": number(0, 1, above=True),
    "top_k": top_k,
    "min_p": number(0, 1),
    "n": integer(1, MAX_N),
    "stop": stop,
    "seed": integer(-INT64, INT64 - 1),
    "presence_penalty": penalty,
    "frequency_penalty": penalty,
    "repetition_penalty": number(0, 2, above=True),
    "logit_bias": logit_bias,
}

FORWARDED: dict[Endpoint, dict[str, Check]] = {
    "chat": _FORWARDED
    | {
        "messages": messages,
        "max_completion_tokens": max_tokens,
        "logprobs": boolean,
        "top_logprobs": integer(0, MAX_LOGPROBS),
    },
    "completions": _FORWARDED | {"prompt": prompt, "logprobs": integer(0, MAX_LOGPROBS)},
}

# Rewritten on the way: the client's name becomes the engine's, and usage is always asked for.
REWRITTEN = frozenset({"model", "stream", "stream_options"})

READ: dict[str, Check] = {"user": sticky, "safety_identifier": sticky, "metadata": metadata}

SET_BY_GATEWAY = frozenset({"cache_salt", "priority", "request_id"})

EVALUATORS_ONLY: dict[str, Check] = {"logprob_token_ids": labels, "return_tokens_as_token_ids": boolean}

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


def rebuild(content: bytes | bytearray, asked: Asked) -> RebuiltRequest:
    """From a client's bytes to what is passed on. Raises as `read_request`, and `Invalid` for what is no JSON."""
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise Invalid(f"the body is not JSON: {error}"[:200], code="invalid_json") from error
    request = read_request(asked.endpoint, body, asked.bounds, is_evaluator=asked.is_evaluator, sticky=asked.sticky)
    opening = orjson.dumps(request.forwarded)[:-1]
    return RebuiltRequest(request.model, request.is_stream, request.wants_usage, request.sticky, opening)


def read_request(
    endpoint: Endpoint, body: Any, bounds: Bounds, *, is_evaluator: bool, sticky: str | None = None
) -> CompletionRequest:
    """Check every field and rebuild the body. `sticky` is the header's key, which wins over the body's.

    Raises `Invalid` that names the first field that is wrong, and what is allowed.
    """
    if not isinstance(body, dict):
        raise Invalid("the body must be a JSON object", code="invalid_body")
    if len(body) > MAX_FIELDS:
        raise Invalid(f"the body has {len(body):,} fields; at most {MAX_FIELDS} are taken", code="too_many")
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
    is_stream = boolean("stream", given.get("stream", False), bounds)
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
    if len(model) > MAX_MODEL_CHARS:
        raise unknown_model(model)
    return model


def unknown_model(model: str) -> NotFound:
    """The error of a name that leads nowhere, for this caller or at all."""
    return NotFound(
        f"model {quoted(model)} does not exist or is not yours; `GET /v1/models` lists what you may use",
        code="model_not_found",
        param="model",
    )


def _wants_usage(options: Any, bounds: Bounds, *, is_stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise fail("stream_options", options, "an object")
    if not is_stream:
        raise Invalid("`stream_options` needs `stream: true`", code="invalid_value", param="stream_options")
    unknown = next((name for name in options if name not in _STREAM_OPTIONS), None)
    if unknown is not None:
        name = f"stream_options.{unknown[:60]}"
        raise Invalid(f"unknown field `{name}`; leave it out", code="unknown_parameter", param=name)
    return boolean("stream_options.include_usage", options.get("include_usage") or False, bounds)
