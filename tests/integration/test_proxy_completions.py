"""Completions through the real gateway, by the official SDK and by raw HTTP, over the fake engine's socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import update

from gateway import tables
from gateway.database import bump_revision
from gateway.keys import Keys, load_pepper
from gateway.proxy import answers
from tests.fakes.answers import answer_text
from tests.fakes.stack import BASE, Stack, chat_body, events_of, until


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        yield running


def sdk(stack: Stack, key: str = "inference") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key=stack.keys.get(key, key), max_retries=0)


def said(text: str) -> str:
    """The prompt as the fake engine hashes it."""
    return json.dumps([{"role": "user", "content": text}], ensure_ascii=False)


# ---- The official client


async def test_the_sdk_chats(stack: Stack) -> None:
    version = await stack.add_version(is_promoted=True)
    async with sdk(stack) as client:
        answer = await client.chat.completions.create(
            model="support@1", messages=[{"role": "user", "content": "hello"}], temperature=0, seed=1, n=2, stop=["x"]
        )

    assert answer.model == "support@1"
    assert [choice.message.content for choice in answer.choices] == [
        answer_text(version.engine_name, said("hello"))
    ] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6


async def test_the_sdk_streams(stack: Stack) -> None:
    async with sdk(stack) as client:
        stream = await client.chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer_text(BASE, said("hello"))
    assert {chunk.model for chunk in chunks} == {BASE}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 3


async def test_the_sdk_completes_text_and_token_ids(stack: Stack) -> None:
    async with sdk(stack) as client:
        text = await client.completions.create(model=BASE, prompt="once", max_tokens=5, logprobs=3)
        ids = await client.completions.create(model=BASE, prompt=[1, 2, 3])

    assert text.choices[0].text == answer_text(BASE, "once")
    assert text.choices[0].logprobs is not None
    assert ids.choices[0].text == answer_text(BASE, "[1, 2, 3]")


async def test_the_sdk_understands_refusals(stack: Stack) -> None:
    message: Any = {"role": "user", "content": "x"}
    async with sdk(stack) as client, sdk(stack, "tn-wrong") as stranger:
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="nope", messages=[message])
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model=BASE, messages=[message], temperature=9)
        with pytest.raises(openai.AuthenticationError):
            await stranger.chat.completions.create(model=BASE, messages=[message])

    assert unknown.value.code == "model_not_found"
    assert bad.value.param == "temperature"


async def test_the_sdk_lists_models(stack: Stack) -> None:
    await stack.add_version("support", 1, is_promoted=True)
    await stack.add_version("support", 2, state_code=None)
    async with sdk(stack) as client, sdk(stack, "preview") as previewer:
        seen = [model.id async for model in client.models.list()]
        previewed = [model.id async for model in previewer.models.list()]
        one = await client.models.retrieve("support@1")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("support@2")

    assert seen == [BASE, "support", "support@1"]
    assert previewed == [*seen, "support@2"]
    assert one.owned_by == "proj_default"


# ---- What answered


@pytest.mark.invariant(2)
async def test_headers_name_what_answered_on_every_way_in(stack: Stack) -> None:
    first = await stack.add_version("support", 1, is_promoted=True)
    second = await stack.add_version("support", 2, is_promoted=True)
    await stack.set_route(
        "support",
        stable="support@2",
        previous="support@1",
        variants=[{"target": target, "weight": 1} for target in ("support@1", "support@2", BASE)],
    )
    known = {version.name: (version.digest, version.engine_name) for version in (first, second)}
    known[BASE] = (stack.gateway.services.registry.base.digest, BASE)

    async with stack.client("inference") as client:
        for number in range(60):
            model = ["support", "support@1", "support@2", "support@stable", "support@previous", BASE][number % 6]
            stream = number % 4 == 0
            response = await client.post(
                "/v1/chat/completions", json=chat_body(f"m{number}", model=model, user=f"u{number}", stream=stream)
            )
            variant = response.headers["x-turnout-variant"]
            digest, engine_name = known[variant]
            assert response.status_code == 200
            assert f'"content":"{engine_name}' in response.text
            assert response.headers["x-turnout-digest"] == digest
            assert response.headers["x-turnout-version"] == variant
            assert response.headers["x-turnout-route"] == (BASE if model == BASE else "support")
            assert response.headers["x-request-id"].startswith("req-")


@pytest.mark.invariant(2)
async def test_an_engine_that_answers_as_another_model_is_not_believed(stack: Stack) -> None:
    version = await stack.add_version(is_promoted=True)
    stack.engine.impostor = "somebody-else"
    async with stack.client("inference") as client:
        for stream in (False, True):
            response = await client.post("/v1/chat/completions", json=chat_body(model="support@1", stream=stream))
            assert response.status_code == 502
            assert response.json()["error"]["code"] == "wrong_model"
            assert version.engine_name not in response.text


@pytest.mark.mutant(2)
async def test_an_impostor_that_were_believed_would_be_seen(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_check_model", lambda found, engine_name: None)

    with pytest.raises(AssertionError):
        await test_an_engine_that_answers_as_another_model_is_not_believed(stack)


async def test_names_and_paths_of_the_engine_stay_inside(stack: Stack) -> None:
    version = await stack.add_version(is_promoted=True)
    async with stack.client("inference") as client:
        whole = await client.post("/v1/chat/completions", json=chat_body(model="support@1", max_tokens=1))
        stream = await client.post("/v1/completions", json={"model": "support@1", "prompt": "x", "stream": True})

    assert whole.json()["model"] == "support@1"
    for event in events_of(stream.content)[:-1]:
        assert json.loads(event)["model"] == "support@1"
        assert json.loads(event).get("usage") is None
    structure = stream.text.replace(f'"text":"{version.engine_name}"', "")
    assert version.engine_name not in structure


async def test_a_stream_without_usage_asked_for_is_counted_all_the_same(stack: Stack) -> None:
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=chat_body("hello", stream=True))

    assert b'"usage"' not in response.content
    tokens = stack.gateway.metrics.registry.get_sample_value(
        "turnout_tokens_total",
        {"route": BASE, "variant": BASE, "version": BASE, "traffic": "pinned", "kind": "completion"},
    )
    assert tokens == 3
    assert stack.engine.asked[0].body["stream_options"] == {"include_usage": True}


async def a_neighbour(stack: Stack) -> None:
    """A key of another project."""
    keys = Keys(stack.database, load_pepper(stack.settings))
    _, stack.keys["neighbour"] = await keys.create("neighbour", ["inference"], actor="test", project_id="proj_other")
    await stack.see()


# ---- What the engine gets


async def test_what_two_projects_ask_shares_no_cache(stack: Stack) -> None:
    await a_neighbour(stack)

    for key in ("inference", "neighbour", "inference"):
        async with stack.client(key) as client:
            assert (await client.post("/v1/chat/completions", json=chat_body("the same"))).status_code == 200

    ours, theirs, again = (asked.body["cache_salt"] for asked in stack.engine.asked)
    assert ours == again
    assert ours != theirs


async def test_the_engine_gets_a_rebuilt_body_salted_by_project(stack: Stack) -> None:
    body = chat_body("hello", user="alice", metadata={"a": "b"}, safety_identifier="s", temperature=0.5)
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=body, headers={"x-amzn-sagemaker-adapter-id": "m"})
        await client.post("/v1/chat/completions", json=chat_body())

    first, second = (asked.body for asked in stack.engine.asked)
    assert first.keys() == {"model", "messages", "temperature", "cache_salt", "request_id"}
    assert first["request_id"] == response.headers["x-request-id"]
    assert first["cache_salt"] == second["cache_salt"]
    assert len(first["cache_salt"]) == 64
    assert "alice" not in json.dumps(first)


@pytest.mark.invariant(9)
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_logprobs": 1},
        {"echo": True, "logprobs": 1},
        {"echo": True},
        {"chat_template": "{{ 1 }}"},
        {"chat_template_kwargs": {"x": 1}},
        {"prompt_embeds": "x"},
        {"kv_transfer_params": {}},
        {"vllm_xargs": {"a": 1}},
        {"use_beam_search": True},
        {"lora_request": {"path": "/etc"}},
        {"logprob_token_ids": [1], "logprobs": 1},
        {"cache_salt": "mine"},
        {"priority": -5},
        {"made_up": 1},
    ],
)
async def test_what_could_hurt_the_engine_never_reaches_it(stack: Stack, fields: dict[str, Any]) -> None:
    async with stack.client("admin") as client:
        response = await client.post("/v1/completions", json={"model": BASE, "prompt": "x", **fields})
        after = await client.post("/v1/completions", json={"model": BASE, "prompt": "x"})

    assert response.status_code in (400, 403)
    assert response.json()["error"]["param"] in fields
    assert after.status_code == 200
    assert len(stack.engine.asked) == 1


@pytest.mark.mutant(9)
async def test_a_field_that_slipped_through_would_be_seen(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.proxy.fields._special", lambda name, value, bounds, *, is_evaluator: value)

    with pytest.raises(AssertionError):
        await test_what_could_hurt_the_engine_never_reaches_it(stack, {"prompt_logprobs": 1})


async def test_an_image_url_never_reaches_the_engine(stack: Stack) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}]
    async with stack.client("inference") as client:
        response = await client.post(
            "/v1/chat/completions", json={"model": BASE, "messages": [{"role": "user", "content": parts}]}
        )

    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_content"
    assert stack.engine.asked == []


async def test_an_evaluator_may_ask_for_labels(stack: Stack) -> None:
    body = {
        "model": BASE, "prompt": [1, 2], "max_tokens": 1, "temperature": 0, "logprobs": 20,
        "logprob_token_ids": [5, 9], "return_tokens_as_token_ids": True,
    }  # fmt: skip
    async with stack.client("evaluator") as client:
        response = await client.post("/v1/completions", json=body)

    [top] = response.json()["choices"][0]["logprobs"]["top_logprobs"]
    assert set(top) == {"token_id:5", "token_id:9"}


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"", "invalid_json"), (b"{", "invalid_json"), (b"[]", "invalid_body"), (b'{"model": NaN}', "invalid_json"),
     (b'"\xff"', "invalid_json"), (b"[" * 100_000, "invalid_json"), (b'{"model":"tiny"}', "missing_parameter")],
)  # fmt: skip
async def test_a_body_that_is_none_is_refused_in_openais_form(stack: Stack, content: bytes, code: str) -> None:
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", content=content)

    assert response.status_code == 400
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["code"] == code


async def test_other_methods_and_paths_are_refused_in_openais_form(stack: Stack) -> None:
    async with stack.client("inference") as client:
        wrong_method = await client.get("/v1/chat/completions")
        responses = await client.post("/v1/responses", json={})
        nothing = await client.get("/v1/nothing")
        compressed = await client.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"})

    assert [r.status_code for r in (wrong_method, responses, nothing, compressed)] == [405, 404, 404, 415]
    assert responses.json()["error"]["code"] == nothing.json()["error"]["code"] == "unknown_url"


# ---- Scopes


async def test_pins_need_preview_until_a_promotion(stack: Stack) -> None:
    await stack.add_version("support", 1, created_by="key:train")
    statuses = {}
    for key in ("inference", "preview", "train", "admin", "evaluator"):
        async with stack.client(key) as client:
            response = await client.post("/v1/chat/completions", json=chat_body(model="support@1"))
            statuses[key] = response.status_code

    assert statuses == {"inference": 403, "preview": 200, "train": 200, "admin": 200, "evaluator": 200}


async def test_a_pin_that_is_not_loaded_is_answered_503_and_causes_no_load(stack: Stack) -> None:
    await stack.add_version("support", 1, is_promoted=True, is_resident=False)
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=chat_body(model="support@1"))

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "version_not_loaded"
    assert response.headers["retry-after"] == "1"
    assert stack.engine.asked == []
    assert stack.engine.calls == []


async def test_a_version_that_is_being_probed_answers_nobody(stack: Stack) -> None:
    await stack.add_version(is_promoted=True)
    async with stack.database.write() as connection:
        await connection.execute(update(tables.residency).values(state="probing"))
        await bump_revision(connection)
    await stack.see()

    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=chat_body(model="support@1"))

    assert (response.status_code, response.json()["error"]["code"]) == (503, "version_not_loaded")
    assert stack.engine.asked == []


async def test_an_engine_that_lost_an_adapter_answers_503_not_404(stack: Stack) -> None:
    version = await stack.add_version(is_promoted=True)
    stack.engine.adapters.pop(version.engine_name)
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=chat_body(model="support@1"))

    assert response.status_code == 503
    assert response.json()["error"]["code"] == "version_not_loaded"
    assert version.engine_name not in response.text


# ---- A/B


@pytest.mark.invariant(8)
async def test_users_stick_to_their_arm_and_shares_hold(stack: Stack, tmp_path: Path) -> None:
    await stack.add_version(is_promoted=True)
    split = [{"target": "support@1", "weight": 50}, {"target": BASE, "weight": 50}]
    await stack.set_route("support", variants=split)
    arms: dict[str, set[str]] = {}
    async with stack.client("inference") as client:
        for _ in range(2):
            for number in range(60):
                response = await client.post("/v1/chat/completions", json=chat_body(model="support", user=f"u{number}"))
                arms.setdefault(f"u{number}", set()).add(response.headers["x-turnout-variant"])
    await stack.stop()
    await stack.serve()
    async with stack.client("inference") as client:
        for number in range(60):
            response = await client.post(
                "/v1/completions", json={"model": "support", "prompt": "x", "user": f"u{number}"}
            )
            arms[f"u{number}"].add(response.headers["x-turnout-variant"])

    assert {len(seen) for seen in arms.values()} == {1}
    assert 15 <= sum(seen == {BASE} for seen in arms.values()) <= 45


@pytest.mark.mutant(8)
async def test_a_key_that_did_not_stick_would_be_seen(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gateway.proxy.completions import Completions

    real = Completions._unit
    monkeypatch.setattr(Completions, "_unit", lambda self, exchange, sticky: real(self, exchange, None))

    with pytest.raises(AssertionError):
        await test_users_stick_to_their_arm_and_shares_hold(stack, tmp_path)


async def test_the_header_wins_over_the_identifier_and_that_over_the_user(stack: Stack) -> None:
    await stack.add_version(is_promoted=True)
    async with stack.client("inference") as client:
        for headers, fields in [
            ({"x-turnout-key": "k"}, {"safety_identifier": "s", "user": "u"}),
            ({"x-turnout-key": "k"}, {"user": "other"}),
            ({}, {"safety_identifier": "s", "user": "u"}),
            ({}, {"safety_identifier": "s"}),
            ({}, {"user": "u"}),
            ({}, {}),
            ({}, {}),
        ]:
            response = await client.post(
                "/v1/chat/completions", json=chat_body(model="support", **fields), headers=headers
            )
            assert response.status_code == 200
    await stack.gateway.recorder.flush()

    units = [row.unit for row in sorted(await stack.rows(tables.exposures), key=lambda row: row.request_id)]
    assert units[0] == units[1]
    assert units[2] == units[3]
    assert len(set(units)) == 5
    assert all(len(unit) == 64 for unit in units)


async def test_the_same_user_of_two_projects_is_two_units(stack: Stack) -> None:
    await stack.add_version("support", is_promoted=True)
    await stack.add_version("sales", is_promoted=True, project_id="proj_other")
    await a_neighbour(stack)

    for key, model in (("inference", "support"), ("neighbour", "sales")):
        async with stack.client(key) as client:
            body = chat_body(model=model, user="alice@example.com")
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    await stack.gateway.recorder.flush()

    first, second = (row.unit for row in await stack.rows(tables.exposures))
    assert first != second


async def test_exposures_are_written_within_a_second(stack: Stack) -> None:
    version = await stack.add_version(is_promoted=True)
    await stack.set_route("support", stable="support@1", variants=[{"target": "support@1", "weight": 100}])
    async with stack.client("inference") as client:
        response = await client.post("/v1/chat/completions", json=chat_body(model="support", user="alice", stream=True))
        for model in (BASE, "support@1", "support@stable"):
            await client.post("/v1/chat/completions", json=chat_body(model=model, user="alice"))
    await until(lambda: stack.gateway.recorder.queued == 0, timeout_s=1.5)
    async with asyncio.timeout(1):
        while not (rows := await stack.rows(tables.exposures)):
            await asyncio.sleep(0.02)

    [row] = rows
    assert (row.request_id, row.route, row.variant) == (response.headers["x-request-id"], "support", "support@1")
    assert (row.digest, row.status, row.finish_reason) == (version.digest, 200, "stop")
    assert (row.replica_id, row.completion_tokens) == ("replica-1", 3)
    assert 0 < row.first_token_s <= row.latency_s
    assert "alice" not in str(row)


async def test_an_evaluation_is_neither_assigned_nor_recorded_and_has_a_label_of_its_own(stack: Stack) -> None:
    await stack.add_version(is_promoted=True)
    await stack.set_route("support", variants=[{"target": "support@1", "weight": 100}])
    async with stack.client("evaluator") as client:
        route = await client.post("/v1/chat/completions", json=chat_body(model="support", user="u"))
        pin = await client.post("/v1/chat/completions", json=chat_body(model="support@1"))
        page = (await client.get("/metrics")).text
    await stack.gateway.recorder.flush()

    assert route.headers["x-turnout-variant"] == BASE  # what is stable, whatever the split
    assert pin.headers["x-turnout-variant"] == "support@1"
    assert await stack.rows(tables.exposures) == []
    counted = [line for line in page.splitlines() if line.startswith("turnout_requests_total{")]
    assert len(counted) == 2
    assert all('traffic="evaluation"' in line for line in counted)


async def test_metrics_show_what_the_database_holds(stack: Stack) -> None:
    version = await stack.add_version()
    await stack.add_verdict(version, "forgetting", "passed")
    async with stack.client("inference") as client:
        page = (await client.get("/metrics")).text

    for line in [
        'turnout_adapter_versions{state="verified"} 1.0',
        'turnout_adapters_resident{state="ready"} 1.0',
        'turnout_replicas{state="ready"} 1.0',
        'turnout_gate_verdicts{suite="forgetting",verdict="passed"} 1.0',
    ]:
        assert line in page
    assert "turnout_routing_revision" in page
