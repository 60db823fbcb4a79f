"""What a user of the OpenAI SDK sees, on the real engine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from gateway.settings import Settings

from .stack import BASE, Stack, wait_for

pytestmark = pytest.mark.engine

END_OF_TURN = "2"  # of this model; ruled out where a test needs an answer that does not end by itself
PROMPT = "Name three colours of the rainbow."


def ask(stack: Stack, model: str, prompt: str = PROMPT, *, max_tokens: int = 24) -> str:
    answer = stack.client().chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=0
    )
    return answer.choices[0].message.content or ""


def test_chat_answers_with_usage_and_names_what_answered(stack: Stack) -> None:
    raw = stack.client().chat.completions.with_raw_response.create(
        model=BASE, messages=[{"role": "user", "content": PROMPT}], max_tokens=16, temperature=0, seed=1
    )
    answer = raw.parse()

    assert answer.model == BASE
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert raw.headers["x-turnout-version"] == BASE
    assert len(raw.headers["x-turnout-digest"]) == 64
    assert raw.headers["x-request-id"]


def test_stream_gives_the_same_text_as_a_whole_answer(stack: Stack) -> None:
    whole = ask(stack, BASE)

    chunks = list(
        stack.client().chat.completions.create(
            model=BASE,
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole
    assert chunks[-1].usage is not None
    assert all(chunk.model == BASE for chunk in chunks)


def test_completions_honour_stop_n_and_logprobs(stack: Stack) -> None:
    answer = stack.client().completions.create(
        model=BASE,
        prompt="One, two, three, four, five, six",
        max_tokens=12,
        temperature=0.8,
        n=2,
        stop=["nine"],
        logprobs=3,
        seed=5,
    )

    assert len(answer.choices) == 2
    assert all("nine" not in choice.text for choice in answer.choices)
    assert answer.choices[0].logprobs is not None


def test_a_pinned_version_answers_and_is_named(stack: Stack, alpha: str) -> None:
    raw = stack.client().chat.completions.with_raw_response.create(
        model="alpha@2", messages=[{"role": "user", "content": PROMPT}], max_tokens=16, temperature=0
    )

    assert raw.headers["x-turnout-version"] == "alpha@2"
    assert raw.parse().model == "alpha@2"


@pytest.mark.parametrize("model", ["nobody", "alpha@99", "", "../../etc", BASE.upper()])
def test_an_unknown_model_is_refused_and_never_answered_by_base(stack: Stack, alpha: str, model: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        ask(stack, model)

    assert refused.value.status_code in (400, 404)
    assert refused.value.body is not None


@pytest.mark.invariant(9)
def test_requests_that_would_kill_the_engine_are_refused_and_it_lives(stack: Stack, alpha: str) -> None:
    killers = [
        {"model": "alpha@1", "prompt": "a b c", "max_tokens": 1, "prompt_logprobs": 1},
        {"model": "alpha@1", "prompt": "a b c", "max_tokens": 1, "echo": True, "logprobs": 1},
        {"model": BASE, "prompt": "a b c", "max_tokens": 1, "lora_request": {"lora_path": "x"}},
        {"model": BASE, "prompt": "a b c", "max_tokens": 1, "kv_transfer_params": {}},
        {"model": BASE, "prompt": [999_999_999], "max_tokens": 1},
    ]
    with stack.http() as client:
        answers = [client.post("/v1/completions", json=body) for body in killers]

    assert [answer.status_code for answer in answers] == [400] * len(killers)
    assert all(answer.json()["error"]["message"] for answer in answers)
    assert ask(stack, BASE)


@pytest.mark.invariant(3)
def test_base_is_the_same_alone_and_beside_adapters(stack: Stack, alpha: str) -> None:
    """By the first token's log-probabilities: another batch moves them a little, an adapter in base's row moves them much more."""
    prompts = [f"{PROMPT} Then say the number {n}." for n in range(4)]
    versions = ("alpha@1", "alpha@2", "alpha@3")
    jobs = [(model, prompt) for prompt in prompts for model in (BASE, *versions)]
    alone = {job: first_token(stack, *job) for job in jobs}

    with ThreadPoolExecutor(len(jobs)) as pool:
        beside = dict(zip(jobs, pool.map(lambda job: first_token(stack, *job), jobs), strict=True))

    noise = [gap(alone[BASE, prompt], beside[BASE, prompt]) for prompt in prompts]
    effect = [gap(alone[BASE, prompt], beside[version, prompt]) for prompt in prompts for version in versions]
    assert min(effect) > 2 * max(noise)


def first_token(stack: Stack, model: str, prompt: str) -> dict[str, float]:
    """Log-probabilities, in nats, of the likeliest first tokens; the answer goes on so that batches overlap."""
    answer = stack.client().chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=24,
        temperature=0,
        logprobs=True,
        top_logprobs=20,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    return {top.token: top.logprob for top in logprobs.content[0].top_logprobs}


def gap(one: dict[str, float], other: dict[str, float]) -> float:
    """Largest difference among the five likeliest tokens of `one`; a token that fell out of the other's twenty counts as 5."""
    likeliest = sorted(one, key=lambda token: -one[token])[:5]
    return max(abs(one[token] - other[token]) if token in other else 5.0 for token in likeliest)


def test_a_client_that_leaves_frees_the_engine(stack: Stack) -> None:
    body = {
        "model": BASE,
        "messages": [{"role": "user", "content": "Count up from one, for ever."}],
        "logit_bias": {END_OF_TURN: -100},
        "max_tokens": 1500,
        "stream": True,
        "temperature": 0,
    }
    with stack.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()  # held: a generator that is dropped closes the connection
        next(lines)
        wait_for(lambda: _running(stack) == 1, timeout_s=60, what="the engine says that it decodes")

    wait_for(lambda: _running(stack) == 0, timeout_s=60, what="the engine stops the request its client left")


def _running(stack: Stack) -> int:
    """Requests that the engine itself says it is decoding, read from its private socket."""
    socket = next(Settings(home=stack.home).run_dir.glob("*.sock"))
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://engine") as client:
        lines = client.get("/metrics").text.splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running")))


@pytest.mark.invariant(9)
def test_no_http_answers_on_any_tcp_port_but_the_gateways(stack: Stack) -> None:
    listening = {
        connection.laddr.port
        for process in stack.tree()
        for connection in process.net_connections(kind="inet")
        if connection.status == "LISTEN"
    }

    assert stack.port in listening
    with ThreadPoolExecutor(max(1, len(listening))) as pool:
        answered = dict(zip(listening, pool.map(speaks_http, listening), strict=True))
    assert {port for port, is_http in answered.items() if is_http} == {stack.port}


def speaks_http(port: int) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=3)
    except httpx.HTTPError:
        return False
    return True


def test_metrics_count_requests_by_version(stack: Stack, alpha: str) -> None:
    ask(stack, "alpha@1")

    with stack.http() as client:
        text = client.get("/metrics").text

    assert any("alpha@1" in line and not line.startswith("#") for line in text.splitlines())
