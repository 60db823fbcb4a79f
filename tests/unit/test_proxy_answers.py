"""Answers on their way to the client: renamed, cleaned, and never finished on the engine's behalf."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import GatewayError, Invalid, Unavailable, UpstreamFailed
from gateway.proxy.answers import Seen, StreamRewriter, engine_error, rewrite_whole
from tests.fakes.stack import events_of

ENGINE = "support.v3.0123456789ab"
ASKED = "support"


def chunk(text: str = "x", *, model: str = ENGINE, finish: str | None = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"id": "c-1", "object": "chat.completion.chunk", "model": model, "choices": [choice], **fields}


def stream(*payloads: dict[str, Any] | str, ensure_ascii: bool = False) -> bytes:
    dumped = [
        payload if isinstance(payload, str) else json.dumps(payload, separators=(",", ":"), ensure_ascii=ensure_ascii)
        for payload in payloads
    ]
    return "".join(f"data: {payload}\n\n" for payload in dumped).encode()


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
LAST = {"id": "c-1", "object": "chat.completion.chunk", "model": ENGINE, "choices": [], "usage": USAGE}


def rewriter(*, wants_usage: bool = False) -> tuple[StreamRewriter, Seen]:
    seen = Seen()
    return StreamRewriter(engine_name=ENGINE, asked_name=ASKED, wants_usage=wants_usage, seen=seen), seen


def test_chunks_carry_the_name_the_client_used() -> None:
    rewriting, seen = rewriter()

    out = rewriting.feed(stream(chunk("a"), chunk("b", finish="stop"), LAST, "[DONE]"))

    first, second, done = events_of(out)
    assert ENGINE.encode() not in out
    assert json.loads(first)["model"] == json.loads(second)["model"] == ASKED
    assert done == b"[DONE]"
    assert rewriting.is_done
    assert (seen.finish_reason, seen.prompt_tokens, seen.completion_tokens) == ("stop", 3, 2)


def test_usage_goes_to_a_client_that_asked_for_it() -> None:
    rewriting, _ = rewriter(wants_usage=True)

    events = events_of(rewriting.feed(stream(chunk(), LAST, "[DONE]")))

    assert json.loads(events[1]) == {**LAST, "model": ASKED}


def test_text_that_looks_like_structure_stays_text() -> None:
    said = f'"model":"{ENGINE}", data: [DONE] "usage":{{"error":1}} data: \n\n'
    rewriting, _ = rewriter()

    [event] = events_of(rewriting.feed(stream(chunk(said))))

    assert json.loads(event)["choices"][0]["delta"]["content"] == said
    assert not rewriting.is_done


@given(
    texts=st.lists(st.text(max_size=12), max_size=6),
    cuts=st.lists(st.integers(min_value=1, max_value=40), max_size=40),
    wants_usage=st.booleans(),
)
def test_where_the_network_cuts_the_stream_does_not_matter(
    texts: list[str], cuts: list[int], *, wants_usage: bool
) -> None:
    content = stream(*(chunk(text) for text in texts), chunk("", finish="length"), LAST, "[DONE]")
    whole, _ = rewriter(wants_usage=wants_usage)
    pieces, seen = rewriter(wants_usage=wants_usage)
    out, rest = b"", content
    for cut in cuts:
        out, rest = out + pieces.feed(rest[:cut]), rest[cut:]

    out += pieces.feed(rest)

    assert [json.loads(event) for event in events_of(out)[:-1]] == [
        json.loads(event) for event in events_of(whole.feed(content))[:-1]
    ]
    assert pieces.is_done
    assert seen.finish_reason == "length"


@pytest.mark.invariant(2)
@pytest.mark.parametrize("model", ["support.v2.0123456789ab", "tiny", "", None, 5])
def test_a_chunk_of_another_model_never_reaches_the_client(model: Any) -> None:
    rewriting, _ = rewriter()
    rewriting.feed(stream(chunk("good")))

    with pytest.raises(UpstreamFailed) as caught:
        rewriting.feed(stream(chunk("bad", model=model)))

    assert caught.value.code == "wrong_model"


@pytest.mark.mutant(2)
def test_a_chunk_of_another_model_that_passed_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.proxy.answers._check_model", lambda found, engine_name: None)

    with pytest.raises(pytest.fail.Exception):
        test_a_chunk_of_another_model_never_reaches_the_client("tiny")


@pytest.mark.parametrize(
    "content",
    [
        stream({"error": {"message": "EngineCore died at 0x7f in /usr/lib/vllm", "code": 500}}),
        b"data: {broken\n\n",
        b"data: 5\n\n",
        b"data: {}\n\n",
    ],
)
def test_an_error_in_the_stream_is_told_in_our_words(content: bytes) -> None:
    rewriting, _ = rewriter()

    with pytest.raises(UpstreamFailed) as caught:
        rewriting.feed(content)

    assert not {"0x", "/", "vllm"} & set(caught.value.message.split())
    assert not rewriting.is_done


def test_an_event_without_end_is_given_up() -> None:
    rewriting, _ = rewriter()

    with pytest.raises(UpstreamFailed):
        rewriting.feed(b"data: " + b"x" * (9 * 2**20))


@pytest.mark.parametrize("said", [b": ping\n\n", b"event: ping\n\n", b"id: 1\nretry: 5\n\n", b"\n\n"])
def test_what_says_nothing_is_dropped(said: bytes) -> None:
    rewriting, _ = rewriter()

    assert rewriting.feed(said) == b""
    assert events_of(rewriting.feed(stream(chunk("x")))) != []


def plain(text: str, *, model: str = ENGINE, **fields: Any) -> dict[str, Any]:
    """A chunk as vLLM writes most of them."""
    made = chunk(text, model=model)
    return {
        "id": made["id"],
        "object": made["object"],
        "created": 1,
        "model": model,
        "choices": made["choices"],
        **fields,
    }


@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=6))
def test_chunks_that_pass_as_bytes_are_the_same_as_those_that_are_parsed(texts: list[str]) -> None:
    content = stream(plain("first"), *(plain(text) for text in texts))
    passing, _ = rewriter()
    parsing, _ = rewriter()

    out = passing.feed(content)
    one_by_one = b"".join(parsing._event(event) for event in parsing._events.feed(content))

    assert [json.loads(event) for event in events_of(out)] == [json.loads(event) for event in events_of(one_by_one)]


def test_most_chunks_are_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    parse = StreamRewriter._chunk

    def counted(self: StreamRewriter, chunk: dict[str, Any]) -> bytes:
        parsed.append(chunk)
        return parse(self, chunk)

    monkeypatch.setattr(StreamRewriter, "_chunk", counted)
    rewriting, _ = rewriter()

    out = rewriting.feed(stream(*(plain(f"wörd {number}") for number in range(50)), "[DONE]"))

    assert len(events_of(out)) == 51
    assert len(parsed) == 1


@pytest.mark.parametrize(
    "content",
    [
        stream(plain("x", model="support.v2.0123456789ab")),
        stream(plain("x") | {"id": "c-2"}),
        stream(plain("x")).replace(b'"x"', b'"\xff"'),
        stream(plain("x")).replace(b'"x"', b'"\\x"'),
        stream(plain("x")).replace(b'"x"', b'"\t"'),
        stream(plain("x")).replace(b'"created":1', b'"created":01x'),
        stream(plain("x")).replace(b"}]}", b"}]"),
        stream(plain("x")).replace(b"}]}", b"}]}}"),
        b"event: error\n" + stream(plain("x")),
        b"data: [DONE]\n" + stream(plain("x")),
    ],
)
@pytest.mark.parametrize("is_among_others", [True, False])
def test_a_chunk_that_only_looks_right_never_reaches_the_client(content: bytes, *, is_among_others: bool) -> None:
    rewriting, _ = rewriter()
    rewriting.feed(stream(plain("good")))
    around = stream(plain("good")) if is_among_others else b""

    with pytest.raises(UpstreamFailed):
        rewriting.feed(around + content + around)


def test_a_stream_of_another_request_is_refused() -> None:
    mine, other = "req-" + "1" * 22, "req-" + "2" * 22
    rewriting = StreamRewriter(engine_name=ENGINE, asked_name=ASKED, wants_usage=False, seen=Seen(), request_id=mine)

    with pytest.raises(UpstreamFailed) as caught:
        rewriting.feed(stream(chunk("theirs") | {"id": f"chatcmpl-{other}"}))

    assert caught.value.code == "wrong_answer"


def test_nothing_behind_done_is_passed_on() -> None:
    rewriting, _ = rewriter()
    rewriting.feed(stream(chunk(finish="stop"), "[DONE]"))
    assert not rewriting.has_surplus

    assert rewriting.feed(stream(chunk("more"))) == b""
    assert rewriting.has_surplus


def test_done_without_a_chunk_is_no_answer() -> None:
    rewriting, _ = rewriter()

    with pytest.raises(UpstreamFailed):
        rewriting.feed(stream("[DONE]"))
    assert not rewriting.is_done


# ---- Whole answers


def whole(model: Any = ENGINE, **fields: Any) -> bytes:
    answer = {"id": "c-1", "model": model, "usage": USAGE, "choices": [{"index": 0, "finish_reason": "stop"}], **fields}
    return json.dumps(answer).encode()


def test_a_whole_answer_is_renamed_and_counted() -> None:
    seen = Seen()

    out = json.loads(rewrite_whole(whole(kv_transfer_params=None), engine_name=ENGINE, asked_name=ASKED, seen=seen))

    assert out["model"] == ASKED
    assert "kv_transfer_params" not in out
    assert (seen.finish_reason, seen.prompt_tokens, seen.completion_tokens) == ("stop", 3, 2)


@pytest.mark.invariant(2)
def test_a_whole_answer_of_another_model_is_refused() -> None:
    with pytest.raises(UpstreamFailed) as caught:
        rewrite_whole(whole("tiny"), engine_name=ENGINE, asked_name=ASKED, seen=Seen())

    assert caught.value.code == "wrong_model"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"5", b"{}", b"<html>", whole(choices=5), whole(usage=None), b'{"model": NaN}']
)
def test_an_answer_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(UpstreamFailed):
        rewrite_whole(content, engine_name=ENGINE, asked_name=ASKED, seen=Seen())


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": "3"}, {"completion_tokens": -1}, {"prompt_tokens": 2**63}, {"prompt_tokens": True}]
)
def test_counts_that_are_none_are_refused(usage: dict[str, Any]) -> None:
    with pytest.raises(UpstreamFailed):
        rewrite_whole(whole(usage=usage), engine_name=ENGINE, asked_name=ASKED, seen=Seen())


def test_the_answer_to_another_request_is_refused() -> None:
    mine, other = "req-" + "1" * 22, "req-" + "2" * 22

    with pytest.raises(UpstreamFailed) as caught:
        rewrite_whole(whole(id=f"cmpl-{other}"), engine_name=ENGINE, asked_name=ASKED, seen=Seen(), request_id=mine)

    assert caught.value.code == "wrong_answer"


# ---- Refusals of the engine


def refusal(status: int, message: str = "", **fields: Any) -> GatewayError:
    content = json.dumps({"error": {"message": message, "type": "x", "code": status, **fields}}).encode()
    return engine_error(status, content, engine_name=ENGINE, asked_name=ASKED)


def test_a_prompt_that_is_too_long_is_told_as_openai_does() -> None:
    error = refusal(
        400, "This model's maximum context length is 2048 tokens. However, you requested 3000.", param="prompt"
    )

    assert isinstance(error, Invalid)
    assert (error.code, error.param) == ("context_length_exceeded", "prompt")
    assert "2048" in error.message


@pytest.mark.parametrize(
    "message",
    [
        "failed in /usr/lib/python3/site-packages/vllm/x.py",
        "object at 0x7f3a2b1c",
        'Traceback (most recent call last):\n  File "x.py"',
        r"C:\models\base",
        "line one\nline two",
        "x" * 500,
        "",
    ],
)
@pytest.mark.parametrize("status", [400, 422, 500, 502, 418])
def test_no_path_address_or_trace_of_the_engine_gets_out(status: int, message: str) -> None:
    error = refusal(status, message, param="/etc/passwd")

    assert error.message in {"the engine refused the request as invalid", "the engine failed; try again"}
    assert error.param is None


def test_the_engines_name_of_a_version_gets_out_as_the_clients() -> None:
    assert refusal(400, f"`{ENGINE}` says no").message == f"`{ASKED}` says no"


def test_an_adapter_that_is_not_loaded_is_worth_another_try() -> None:
    error = refusal(404, f"The model `{ENGINE}` does not exist.")

    assert isinstance(error, Unavailable)
    assert error.code == "version_not_loaded"


def test_numbers_that_are_none_are_the_models_fault_not_the_clients() -> None:
    assert isinstance(refusal(400, "Out of range float values are not JSON compliant"), UpstreamFailed)


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_engine_is_worth_another_try(status: int) -> None:
    assert isinstance(refusal(status), Unavailable)


@pytest.mark.parametrize("content", [b"", b"Internal Server Error", b"[]", b'{"error": 5}', b'{"error": {}}'])
def test_an_error_in_another_form_is_an_error_too(content: bytes) -> None:
    assert isinstance(engine_error(400, content, engine_name=ENGINE, asked_name=ASKED), Invalid)
    assert isinstance(engine_error(500, content, engine_name=ENGINE, asked_name=ASKED), UpstreamFailed)
