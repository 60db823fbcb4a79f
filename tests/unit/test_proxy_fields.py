"""The allow-list of completion requests: what passes, what is refused, and that the refusal names it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Forbidden, Invalid
from gateway.proxy import fields
from gateway.proxy.checks import Bounds
from gateway.proxy.fields import CompletionRequest, Endpoint, read_request

BOUNDS = Bounds(vocab_size=100, max_model_len=64)
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}


def read(body: Any, *, endpoint: Endpoint = "chat", is_evaluator: bool = False) -> CompletionRequest:
    return read_request(endpoint, body, BOUNDS, is_evaluator=is_evaluator)


def refusal(body: Any, *, endpoint: Endpoint = "chat") -> Invalid:
    with pytest.raises(Invalid) as caught:
        read(body, endpoint=endpoint)
    return caught.value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 64),
        ("max_completion_tokens", 1),
        ("temperature", 0),
        ("temperature", 1.5),
        ("top_p", 1),
        ("top_k", -1),
        ("min_p", 0.1),
        ("n", 8),
        ("stop", "x"),
        ("stop", ["a"] * 8),
        ("seed", -(2**63)),
        ("logprobs", True),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"5": -100, "99": 3.5}),
    ],
)
def test_a_field_within_its_bound_is_forwarded_as_it_is(name: str, value: Any) -> None:
    assert read({**CHAT, name: value}).forwarded[name] == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 65),
        ("max_tokens", True),
        ("max_tokens", 3.0),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 101),
        ("min_p", 2),
        ("n", 9),
        ("n", 0),
        ("stop", ["a"] * 9),
        ("stop", [""]),
        ("stop", [1]),
        ("seed", 2**63),
        ("logprobs", 5),
        ("presence_penalty", 2.1),
        ("repetition_penalty", 0),
        ("logit_bias", []),
        ("logit_bias", {str(token): 1 for token in range(301)}),
        ("user", ""),
        ("user", 5),
        ("safety_identifier", "x" * 513),
        ("metadata", {"a": 1}),
        ("stream", "yes"),
    ],
)
def test_a_field_beyond_its_bound_is_refused_by_name(name: str, value: Any) -> None:
    error = refusal({**CHAT, name: value})

    assert error.param == name
    assert f"`{name}`" in error.message


@pytest.mark.parametrize("token", ["100", "-1", "1.0", "x", "", "٣", "9" * 40])
def test_a_bias_of_a_token_outside_the_vocabulary_is_refused(token: str) -> None:
    assert (refusal({**CHAT, "logit_bias": {token: 1}}).param or "").startswith("logit_bias")


def test_top_logprobs_needs_logprobs_and_stops_at_twenty() -> None:
    assert read({**CHAT, "logprobs": True, "top_logprobs": 20}).forwarded["top_logprobs"] == 20
    assert refusal({**CHAT, "logprobs": True, "top_logprobs": 21}).param == "top_logprobs"
    assert refusal({**CHAT, "top_logprobs": 3}).param == "top_logprobs"
    assert refusal({**COMPLETION, "logprobs": 21}, endpoint="completions").param == "logprobs"


@pytest.mark.invariant(9)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize("name", sorted(fields.REFUSED))
def test_a_refused_field_says_why(name: str, endpoint: Endpoint) -> None:
    body = CHAT if endpoint == "chat" else COMPLETION

    error = refusal({**body, name: 7}, endpoint=endpoint)

    assert (error.code, error.param) == ("unsupported_parameter", name)
    assert fields.REFUSED[name] in error.message


@pytest.mark.mutant(9)
def test_a_refused_field_that_were_forwarded_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "_special", lambda name, value, bounds, *, is_evaluator: value)

    with pytest.raises(pytest.fail.Exception):
        test_a_refused_field_says_why("prompt_logprobs", "completions")


@pytest.mark.parametrize("name", ["lora_request", "lora_path", "lora_name"])
def test_nothing_but_model_chooses_an_adapter(name: str) -> None:
    assert refusal({**CHAT, name: "x"}).code == "unsupported_parameter"


@pytest.mark.parametrize("name", ["cache_salt", "priority", "request_id"])
def test_what_the_gateway_sets_is_not_the_clients_to_set(name: str) -> None:
    assert refusal({**CHAT, name: "x"}).param == name


def test_any_other_field_is_refused_by_name() -> None:
    error = refusal({**CHAT, "colour": "red"})

    assert (error.code, error.param) == ("unknown_parameter", "colour")


def test_fields_of_the_other_endpoint_are_unknown() -> None:
    assert refusal({**CHAT, "prompt": "x"}).code == "unknown_parameter"
    assert refusal({**COMPLETION, "messages": CHAT["messages"]}, endpoint="completions").code == "unknown_parameter"


def test_labels_are_for_evaluators_only() -> None:
    body = {**COMPLETION, "logprobs": 5, "logprob_token_ids": [1, 2], "return_tokens_as_token_ids": True}

    forwarded = read(body, endpoint="completions", is_evaluator=True).forwarded

    assert forwarded["logprob_token_ids"] == [1, 2]
    with pytest.raises(Forbidden, match="logprob_token_ids"):
        read(body, endpoint="completions")


@pytest.mark.parametrize("labels", [[], [100], [-1], [True], ["1"], list(range(99)) * 2])
def test_labels_are_bounded(labels: list[Any]) -> None:
    body = {**COMPLETION, "logprobs": 5, "logprob_token_ids": labels}

    with pytest.raises(Invalid, match="logprob_token_ids"):
        read(body, endpoint="completions", is_evaluator=True)


@pytest.mark.parametrize("model", [None, "", 5, ["m"]])
def test_a_request_without_a_model_is_refused(model: Any) -> None:
    assert refusal({**CHAT, "model": model}).code == "missing_model"


@pytest.mark.parametrize("body", [None, [], "x", 5])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    assert refusal(body).code == "invalid_body"


def test_null_is_as_good_as_absent() -> None:
    request = read({**CHAT, "temperature": None, "tools": None, "prompt_logprobs": None})

    assert set(request.forwarded) == {"messages"}


def test_defaults_that_are_spelt_out_ask_for_nothing() -> None:
    body = {**CHAT, "tools": [], "response_format": {"type": "text"}, "store": False, "echo": False, "best_of": 1}

    assert set(read(body).forwarded) == {"messages"}
    assert refusal({**CHAT, "echo": 0}).param == "echo"
    assert refusal({**CHAT, "best_of": True}).param == "best_of"


def test_what_the_gateway_reads_is_not_forwarded() -> None:
    request = read({**CHAT, "user": "u", "safety_identifier": "s", "metadata": {"a": "b"}})

    assert set(request.forwarded) == {"messages"}
    assert request.sticky == "s"
    assert read({**CHAT, "user": "u"}).sticky == "u"


def test_a_stream_always_reports_its_usage_to_the_gateway() -> None:
    silent = read({**CHAT, "stream": True})
    asked = read({**CHAT, "stream": True, "stream_options": {"include_usage": True}})

    assert silent.forwarded["stream_options"] == asked.forwarded["stream_options"] == {"include_usage": True}
    assert (silent.wants_usage, asked.wants_usage) == (False, True)


@pytest.mark.parametrize("options", [{"continuous_usage_stats": True}, [], {"include_usage": 1}])
def test_other_stream_options_are_refused(options: Any) -> None:
    assert (refusal({**CHAT, "stream": True, "stream_options": options}).param or "").startswith("stream_options")


def test_stream_options_need_a_stream() -> None:
    assert refusal({**CHAT, "stream_options": {"include_usage": True}}).param == "stream_options"


# ---- Messages and prompts


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}],
        [{"type": "input_audio", "input_audio": {}}],
        [{"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}],
        [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}],
        [{"type": "TEXT", "text": "x"}],
        [{"image_url": {"url": "http://x"}}],
        ["x"],
    ],
)
def test_content_that_is_not_text_is_refused(content: Any) -> None:
    error = refusal({**CHAT, "messages": [{"role": "user", "content": content}]})

    assert error.code == "unsupported_content"
    assert (error.param or "").startswith("messages[0].content")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"role": "user", "content": 5},
        {"role": "user", "content": []},
        {"role": "tool", "content": "x"},
        {"role": "User", "content": "x"},
        {"content": "x"},
        {"role": "user", "content": "x", "tool_calls": [{}]},
        {"role": "user", "content": "x", "name": ""},
        {"role": "user", "content": [{"type": "text", "text": "x", "image_url": "http://x"}]},
        {"role": "user", "content": [{"type": "text", "text": 5}]},
        "x",
    ],
)
def test_a_malformed_message_is_refused_by_its_place(message: Any) -> None:
    error = refusal({**CHAT, "messages": [CHAT["messages"][0], message]})

    assert (error.param or "").startswith("messages[1]")


def test_an_answer_of_the_sdk_may_be_sent_back() -> None:
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "tool_calls": [],
        "annotations": [],
    }

    request = read({**CHAT, "messages": [*CHAT["messages"], answer]})

    assert request.forwarded["messages"][1] == {"role": "assistant", "content": "yes"}


def test_text_parts_pass() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert read({**CHAT, "messages": [{"role": "user", "content": parts}]}).forwarded["messages"][0]["content"] == parts


@pytest.mark.parametrize("prompt", ["x", ["x", "y"], [0, 99], [[1, 2], [3]]])
def test_a_prompt_is_text_or_token_ids(prompt: Any) -> None:
    assert read({**COMPLETION, "prompt": prompt}, endpoint="completions").forwarded["prompt"] == prompt


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [100],
        [-1],
        [1, True],
        [1, "x"],
        [1.0],
        [[1], "x"],
        [[]],
        [[100]],
        ["x", ""],
        ["x"] * 65,
        [1] * 65,
        {},
        5,
    ],
)
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    assert (refusal({**COMPLETION, "prompt": prompt}, endpoint="completions").param or "").startswith("prompt")


@pytest.mark.parametrize(("endpoint", "missing"), [("chat", "messages"), ("completions", "prompt")])
def test_a_request_without_its_subject_is_refused(endpoint: Endpoint, missing: str) -> None:
    assert refusal({"model": "m"}, endpoint=endpoint).param == missing


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_names = st.sampled_from(sorted({*fields.FORWARDED["chat"], *fields.REFUSED, *fields.READ, "stream", "stream_options"}))


@given(
    body=st.dictionaries(_names | st.text(max_size=8), _json, max_size=5),
    endpoint=st.sampled_from(["chat", "completions"]),
)
def test_whatever_comes_in_only_listed_fields_go_out(body: dict[str, Any], endpoint: Endpoint) -> None:
    try:
        request = read(
            {**CHAT, **COMPLETION, **body} if endpoint == "chat" else {**COMPLETION, **body}, endpoint=endpoint
        )
    except (Invalid, Forbidden):
        return
    assert request.forwarded.keys() <= {*fields.FORWARDED[endpoint], "stream", "stream_options"}
