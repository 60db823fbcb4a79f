"""The demo's users: requests by the official OpenAI SDK, and what their answers prove."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from openai import OpenAI, OpenAIError
from openai.types.chat.chat_completion import Choice
from rich.table import Table

from .data import MAX_TOKENS
from .speaker import KnownAnswers, Spoken

KEYS = frozenset({"intent", "order", "product", "urgency"})
CLIENTS = 8
TOP_LOGPROBS = 8  # of each token, by which the demo knows who answered
TIMEOUT_S = 600.0  # as long as the gateway itself gives a request: against hanging, not against a slow machine


@dataclass(frozen=True)
class Email:
    """One e-mail of a customer and the JSON that is right for it."""

    number: int
    messages: tuple[dict[str, str], ...]
    expected: dict[str, str]


@dataclass(frozen=True)
class Answer:
    """What came back for one request; times are wall times, comparable between processes of one machine."""

    email: Email
    user: str
    sent_at: float
    done_at: float
    version: str = ""
    digest: str = ""
    text: str = ""
    error: str | None = None
    spoken: Spoken = ()

    @property
    def latency_s(self) -> float:
        """From sending to the whole answer."""
        return self.done_at - self.sent_at

    @property
    def parsed(self) -> dict[str, object] | None:
        """The answer as the object that was asked for; None when it is anything else."""
        try:
            found = json.loads(self.text)
        except ValueError:
            return None
        return found if isinstance(found, dict) and found.keys() >= KEYS else None

    @property
    def is_exact(self) -> bool:
        """Whether every field is right."""
        return self.parsed == self.email.expected


def read_emails(path: Path, count: int) -> list[Email]:
    """The first rows of a chat JSONL file as requests with known answers."""
    with path.open() as file:
        rows = [json.loads(line)["messages"] for _, line in zip(range(count), file, strict=False)]
    return [
        Email(number, tuple(messages[:-1]), json.loads(messages[-1]["content"])) for number, messages in enumerate(rows)
    ]


class Users:
    """Sends e-mails to one route, as users of a server without keys do."""

    def __init__(self, url: str, route: str) -> None:
        # No retry: a request that fails must be seen to fail.
        self._openai = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
        self._route = route

    def ask(self, email: Email, user: str) -> Answer:
        """One request; a failure is an answer with an error."""
        sent_at = time.time()
        try:
            raw = self._openai.chat.completions.with_raw_response.create(
                model=self._route,
                messages=list(email.messages),  # type: ignore[arg-type]
                max_tokens=MAX_TOKENS,
                temperature=0,
                user=user,
                logprobs=True,
                top_logprobs=TOP_LOGPROBS,
            )
            choice = raw.parse().choices[0]
        except OpenAIError as error:
            return Answer(email, user, sent_at, time.time(), error=f"{type(error).__name__}: {error}")
        version, digest = raw.headers.get("x-turnout-version", ""), raw.headers.get("x-turnout-digest", "")
        text = choice.message.content or ""
        return Answer(email, user, sent_at, time.time(), version, digest, text, spoken=_spoken(choice))

    def ask_all(self, requests: Iterable[tuple[Email, str]]) -> list[Answer]:
        """Several requests, a few at a time."""
        with ThreadPoolExecutor(CLIENTS) as pool:
            return list(pool.map(lambda request: self.ask(*request), requests))


def _spoken(choice: Choice) -> Spoken:
    """The tokens of an answer with the likeliest at each place."""
    content = choice.logprobs.content if choice.logprobs else None
    return tuple((said.token, {top.token: top.logprob for top in said.top_logprobs}) for said in content or ())


class Flow:
    """Traffic that goes on in the background until the block ends."""

    def __init__(self, users: Users, emails: Sequence[Email]) -> None:
        self._users = users
        self._emails = emails
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._answers: list[Answer] = []
        self._threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(CLIENTS)]

    def __enter__(self) -> Flow:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)

    def _work(self, worker: int) -> None:
        turn = worker
        while not self._stop.is_set():
            answer = self._users.ask(self._emails[turn % len(self._emails)], f"user-{worker}-{turn}")
            turn += CLIENTS
            with self._changed:
                self._answers.append(answer)
                self._changed.notify_all()

    @property
    def answers(self) -> list[Answer]:
        """All answers so far."""
        with self._changed:
            return list(self._answers)

    def wait_for(self, count: int, *, sent_after: float = 0.0) -> bool:
        """Until so many requests that were sent after a moment are answered; False when no answer comes any more."""
        with self._changed:
            while sum(answer.sent_at > sent_after for answer in self._answers) < count:
                if not self._changed.wait(TIMEOUT_S):
                    return False
            return True


def unsticky_users(answers: Iterable[Answer]) -> int:
    """Users who met more than one version."""
    met: dict[str, set[str]] = defaultdict(set)
    for answer in answers:
        if answer.error is None:
            met[answer.user].add(answer.version)
    return sum(len(versions) > 1 for versions in met.values())


def share_of(version: str, answers: Iterable[Answer]) -> float | None:
    """Which part of the answers this version gave; None when there was no answer."""
    given = [answer.version for answer in answers if answer.error is None]
    return given.count(version) / len(given) if given else None


@dataclass(frozen=True)
class Switch:
    """How a rollback looked from outside."""

    call_ms: float
    last_old_start_ms: float  # start of the last request that the old version answered; 0: none after the call
    last_old_answer_ms: float  # end of the last answer of the old version
    wrong: tuple[Answer, ...]

    @property
    def took_ms(self) -> float:
        """From the call until both it was done and every new request was answered by the new version."""
        return max(self.call_ms, self.last_old_start_ms)


def watch_switch(
    answers: Sequence[Answer], *, old: str, started_at: float, completed_at: float, known: KnownAnswers
) -> Switch:
    """Judge the answers around a move away from `old`."""
    good = [answer for answer in answers if answer.error is None]
    after = [answer for answer in good if answer.version == old and answer.sent_at >= started_at]
    ended = [answer.done_at for answer in good if answer.version == old and answer.done_at >= started_at]
    late = [answer for answer in after if answer.sent_at > completed_at]
    contradicting = [answer for answer in good if answer not in late and is_contradicted(known, answer)]
    return Switch(
        call_ms=(completed_at - started_at) * 1000,
        last_old_start_ms=max(((answer.sent_at - started_at) * 1000 for answer in after), default=0.0),
        last_old_answer_ms=max(((at - started_at) * 1000 for at in ended), default=0.0),
        wrong=(*late, *contradicting),
    )


def learn(known: KnownAnswers, version: str, answers: Iterable[Answer]) -> None:
    """Remember answers that `version` alone can have given."""
    for answer in answers:
        if answer.error is None:
            known.learn(version, answer.email.number, answer.spoken)


def is_contradicted(known: KnownAnswers, answer: Answer) -> bool:
    """Whether another version gave it than its headers name."""
    return known.contradicts(answer.version, answer.email.number, answer.spoken)


def by_version(answers: Sequence[Answer], title: str) -> Table:
    """Share, format, exactness and latency of each version that answered."""
    table = Table(
        "VERSION",
        "REQUESTS",
        "SHARE",
        "VALID FORMAT",
        "EXACT MATCH",
        "MEDIAN LATENCY",
        title=title,
        box=None,
        title_justify="left",
    )
    counts: Mapping[str, int] = Counter(answer.version or "(failed)" for answer in answers)
    for version, count in sorted(counts.items()):
        arm = [answer for answer in answers if (answer.version or "(failed)") == version]
        latency = sorted(answer.latency_s for answer in arm)[len(arm) // 2]
        table.add_row(
            version,
            str(count),
            f"{count / len(answers):.0%}",
            f"{sum(answer.parsed is not None for answer in arm) / count:.0%}",
            f"{sum(answer.is_exact for answer in arm) / count:.0%}",
            f"{latency:.2f} s",
        )
    return table
