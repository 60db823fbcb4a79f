"""Moving traffic on the real engine: no request fails, and none is answered by another version than its headers name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest

from deploy.demo.speaker import KnownAnswers

from .stack import BASE, Stack

pytestmark = pytest.mark.engine

PROMPTS = (
    "Tell me about the sea.",
    "What is a good breakfast?",
    "Describe a train station.",
    "Who was Napoleon?",
    "Write about bread.",
    "Why is the sky blue?",
    "Give me advice on sleep.",
    "What is a library?",
)
MAX_TOKENS = 16
VERSIONS = (BASE, "alpha@1", "alpha@2", "alpha@3")


@dataclass(frozen=True)
class Answer:
    """One reply, and when its request was sent."""

    sent: float
    status: int
    version: str
    prompt: str
    text: str
    spoken: tuple[tuple[str, dict[str, float]], ...] = ()


@dataclass(frozen=True)
class Oracle:
    """What each version says when asked by its pinned name, to prompts that tell all versions apart."""

    known: KnownAnswers
    prompts: tuple[str, ...]

    @classmethod
    def learn(cls, stack: Stack) -> Oracle:
        known = KnownAnswers()
        with stack.http() as client:
            for version in VERSIONS:
                for number, prompt in enumerate(PROMPTS):
                    known.learn(version, number, complete(client, version, prompt).spoken)
        return cls(known, tuple(PROMPTS[number] for number in known.tells_apart(range(len(PROMPTS)))))

    def is_lie(self, answer: Answer) -> bool:
        """Whether another version than the one that its headers name gave this answer."""
        return self.known.contradicts(answer.version, PROMPTS.index(answer.prompt), answer.spoken)


def complete(client: httpx.Client, model: str, prompt: str, unit: str = "someone") -> Answer:
    sent = time.monotonic()
    answer = client.post(
        "/v1/chat/completions",
        json={
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": 10,
        },
        headers={"x-turnout-key": unit},
    )
    version = answer.headers.get("x-turnout-version", "")
    if answer.status_code != 200:
        return Answer(sent, answer.status_code, version, prompt, answer.text)
    choice = answer.json()["choices"][0]
    spoken = tuple(
        (said["token"], {top["token"]: top["logprob"] for top in said["top_logprobs"]})
        for said in choice["logprobs"]["content"]
    )
    return Answer(sent, 200, version, prompt, choice["message"]["content"], spoken)


@pytest.fixture(scope="module")
def oracle(stack: Stack, alpha: str) -> Oracle:
    learned = Oracle.learn(stack)
    assert len(learned.prompts) >= 2, "answers must tell versions apart"
    return learned


@pytest.mark.invariant(2)
def test_an_answer_under_another_versions_name_is_told(stack: Stack, oracle: Oracle) -> None:
    """What the tests below rely on: each version's answers, put under each other's name, are found, and under its own not."""
    with stack.http() as client:
        answers = [complete(client, version, prompt) for version in VERSIONS for prompt in oracle.prompts]

    assert [answer for answer in answers if oracle.is_lie(answer)] == []
    for answer in answers:
        for other in VERSIONS:
            assert oracle.is_lie(replace(answer, version=other)) is (other != answer.version)


@contextmanager
def traffic(stack: Stack, route: str, prompts: tuple[str, ...], *, users: int = 4) -> Iterator[list[Answer]]:
    """Keep asking until the block ends."""
    seen: list[Answer] = []
    over = threading.Event()

    def user(number: int) -> None:
        with stack.http() as client:
            turn = number
            while not over.is_set():
                seen.append(complete(client, route, prompts[turn % len(prompts)], unit=f"user-{number}"))
                turn += 1

    threads = [threading.Thread(target=user, args=(number,)) for number in range(users)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        over.set()
        for thread in threads:
            thread.join()


def wait_answers(seen: list[Answer], count: int) -> None:
    """Until that many more answers have come."""
    goal = len(seen) + count
    deadline = time.monotonic() + 60
    while len(seen) < goal:
        assert time.monotonic() < deadline, "traffic has stopped"
        time.sleep(0.02)


def promote(stack: Stack, target: str) -> httpx.Response:
    with stack.http() as client:
        return client.post(
            "/api/routes/alpha/promote", json={"target": target, "force": True, "reason": "end-to-end test"}
        )


def force(stack: Stack, target: str) -> None:
    answer = promote(stack, target)
    assert answer.status_code == 200, answer.text


def stand_on(stack: Stack, target: str) -> None:
    """Make it stable, whatever earlier tests left."""
    if stack.get("/api/routes/alpha")["stable"] != target:
        force(stack, target)


def rollback(stack: Stack, **body: object) -> httpx.Response:
    with stack.http() as client:
        return client.post("/api/routes/alpha/rollback", json={"reason": "end-to-end test"} | body)


@pytest.mark.invariant(2)
@pytest.mark.invariant(7)
def test_promote_and_roll_back_under_load(stack: Stack, oracle: Oracle) -> None:
    stand_on(stack, "alpha@1")
    with traffic(stack, "alpha", oracle.prompts) as seen:
        wait_answers(seen, 8)
        force(stack, "alpha@2")
        promoted = time.monotonic()
        wait_answers(seen, 12)
        moved = rollback(stack)
        rolled_back = time.monotonic()
        wait_answers(seen, 12)

    assert moved.status_code == 200, moved.text
    assert moved.json()["needs_load"] is False
    assert [a for a in seen if a.status != 200] == []
    assert {a.version for a in seen if a.sent > rolled_back} == {"alpha@1"}
    assert "alpha@2" in {a.version for a in seen if promoted < a.sent < rolled_back}
    assert [a for a in seen if oracle.is_lie(a)] == []


@pytest.mark.invariant(7)
def test_rolling_back_twice_walks_back_and_ends_at_base(stack: Stack, oracle: Oracle) -> None:
    route = stack.get("/api/routes/alpha")
    while route["stable"] != BASE:
        assert rollback(stack, further=True).status_code == 200
        route = stack.get("/api/routes/alpha")

    refused = rollback(stack, further=True)

    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "nothing_to_roll_back"
    with stack.http() as client:
        assert complete(client, "alpha", PROMPTS[0]).version == BASE


@pytest.mark.invariant(7)
def test_a_version_that_was_rolled_back_returns_only_by_force(stack: Stack, oracle: Oracle) -> None:
    force(stack, "alpha@3")
    assert rollback(stack).status_code == 200

    with stack.http() as client:
        refused = client.post("/api/routes/alpha/promote", json={"target": "alpha@3", "reason": "again"})

    assert refused.status_code in (409, 422)
    force(stack, "alpha@3")
    assert stack.get("/api/routes/alpha")["stable"] == "alpha@3"


@pytest.mark.invariant(7)
def test_two_rollbacks_at_once_move_one_step_each_at_most(stack: Stack, oracle: Oracle) -> None:
    stand_on(stack, "alpha@1")
    force(stack, "alpha@2")
    before = stack.get("/api/routes/alpha")["revision"]

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: rollback(stack), range(2)))

    after = stack.get("/api/routes/alpha")
    won = [answer for answer in answers if answer.status_code == 200 and not answer.json()["repeated"]]
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert after["revision"] == before + len(won)
    assert "alpha@2" not in (after["stable"], after["previous"])


@pytest.mark.invariant(2)
@pytest.mark.invariant(7)
def test_a_rollback_during_a_promote_leaves_one_of_the_two_whole(stack: Stack, oracle: Oracle) -> None:
    stand_on(stack, "alpha@1")
    before = stack.get("/api/routes/alpha")

    with traffic(stack, "alpha", oracle.prompts) as seen:
        with ThreadPoolExecutor(2) as pool:
            promoting = pool.submit(promote, stack, "alpha@2")
            rolling = pool.submit(rollback, stack)
        answers = [promoting.result(), rolling.result()]
        settled = time.monotonic()
        wait_answers(seen, 8)

    after = stack.get("/api/routes/alpha")
    won = tuple(answer.status_code == 200 for answer in answers)
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert any(won)
    assert after["revision"] == before["revision"] + sum(won)
    assert after["stable"] in ({"alpha@1", "alpha@2"} if all(won) else {"alpha@2" if won[0] else before["previous"]})
    assert {a.version for a in seen if a.sent > settled} == {after["stable"]}
    assert [a for a in seen if a.status != 200 or oracle.is_lie(a)] == []


@pytest.mark.invariant(8)
def test_a_split_is_sticky_and_near_its_weights(stack: Stack, oracle: Oracle) -> None:
    stand_on(stack, "alpha@1")
    stack.put(
        "/api/routes/alpha/variants",
        {
            "variants": [{"target": BASE, "weight": 50}, {"target": "alpha@1", "weight": 50}],
            "reason": "end-to-end test",
        },
    )
    units = [f"u{n}" for n in range(24)]
    with stack.http() as client, ThreadPoolExecutor(8) as pool:
        first, again = (
            list(pool.map(lambda unit: complete(client, "alpha", PROMPTS[0], unit=unit).version, units))
            for _ in range(2)
        )

    assert again == first
    assert 4 <= first.count(BASE) <= 20


@pytest.mark.invariant(1)
def test_republished_bytes_never_take_a_used_name_or_path(stack: Stack, weights: Path, alpha: str) -> None:
    versions = {n: stack.get(f"/api/adapters/alpha/versions/{n}") for n in (1, 2, 3)}
    same = stack.publish(weights / "seed1", "alpha")
    fresh = stack.publish(weights / "seed4", "alpha")

    assert same.status_code == 200
    assert same.json()["version"] == 1
    assert fresh.status_code == 201
    found = stack.wait_resident(f"alpha@{fresh.json()['version']}")
    assert found["digest"] not in {version["digest"] for version in versions.values()}
