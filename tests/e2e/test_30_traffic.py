"""Moving traffic on the real engine: no request fails, and none is answered by another version than its headers name."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import httpx
import pytest

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
CLEARLY_DIFFERENT = 0.6
VERSIONS = (BASE, "alpha@1", "alpha@2", "alpha@3")


@dataclass(frozen=True)
class Answer:
    """One reply, and when its request was sent."""

    sent: float
    status: int
    version: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Oracle:
    """What each version answers when asked by its pinned name, for prompts that tell all versions apart."""

    known: dict[tuple[str, str], str]
    prompts: tuple[str, ...]

    @classmethod
    def learn(cls, stack: Stack) -> Oracle:
        with stack.http() as client:
            known = {
                (version, prompt): complete(client, version, prompt).text for version in VERSIONS for prompt in PROMPTS
            }
        return cls(known, tuple(prompt for prompt in PROMPTS if cls._separates(known, prompt)))

    @staticmethod
    def _separates(known: dict[tuple[str, str], str], prompt: str) -> bool:
        texts = [known[version, prompt] for version in VERSIONS]
        pairs = [(a, b) for n, a in enumerate(texts) for b in texts[n + 1 :]]
        return all(SequenceMatcher(None, a, b).ratio() < CLEARLY_DIFFERENT for a, b in pairs)

    def speaker(self, prompt: str, text: str) -> str:
        """The version whose known answer is nearest. Batches change the last bits of a logit, so not by equality."""
        near = {version: SequenceMatcher(None, text, self.known[version, prompt]).ratio() for version in VERSIONS}
        return max(near, key=lambda version: near[version])


def complete(client: httpx.Client, model: str, prompt: str, unit: str = "someone") -> Answer:
    sent = time.monotonic()
    answer = client.post(
        "/v1/chat/completions",
        json={
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
        },
        headers={"x-turnout-key": unit},
    )
    text = answer.json()["choices"][0]["message"]["content"] if answer.status_code == 200 else answer.text
    return Answer(sent, answer.status_code, answer.headers.get("x-turnout-version", ""), prompt, text)


@pytest.fixture(scope="module")
def oracle(stack: Stack, alpha: str) -> Oracle:
    learned = Oracle.learn(stack)
    assert len(learned.prompts) >= 2, f"answers must tell versions apart: {learned.known}"
    return learned


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
    assert [a for a in seen if oracle.speaker(a.prompt, a.text) != a.version] == []


@pytest.mark.invariant(7)
def test_rolling_back_twice_walks_back_and_ends_at_base(stack: Stack, oracle: Oracle) -> None:
    route = stack.get("/api/routes/alpha")
    while route["stable"] != BASE:
        assert rollback(stack).status_code == 200
        route = stack.get("/api/routes/alpha")

    refused = rollback(stack)

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
    won = [answer for answer in answers if answer.status_code == 200]
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
    assert [a for a in seen if a.status != 200 or oracle.speaker(a.prompt, a.text) != a.version] == []


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
