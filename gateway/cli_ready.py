"""`turnout status --wait`: follows the engine's start, says each failure with its reason, and gives up when it is final.

Final is: `FUTILE_STARTS` starts in a row ended before the engine served, no adapter was to blame, and the waiter saw the
last of them happen, so that it never gives up over what an earlier server left in the table. The server itself goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.markup import escape

from .cli_console import Patience, Session, poll
from .client import Client
from .client_models import Replica
from .errors import GatewayError, Unavailable, UpstreamFailed
from .logs import Seldom

FUTILE_STARTS = 3
# A dead gateway is started again by its supervisor after half a minute at most; one that is gone for longer stays away.
GONE_AFTER_S = 60.0
ABSENT_AFTER_S = 600.0
# A controller ends every start by itself, so this is for a server without one.
STALLED_AFTER_S = 1800.0


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at the server found."""

    readiness: Literal["ready", "not_ready", "absent"]
    replicas: tuple[Replica, ...] | None = None  # None: it could not be asked just now

    @property
    def sign(self) -> object:
        """Differs from the last look's when something moved."""
        rows = [(r.id, r.state, r.self_test, r.started_at, r.failures, r.ready_adapters) for r in self.replicas or ()]
        return self.readiness, rows


# ---- Deciding -------------------------------------------------------------------------------------------------------


def doing(look: Look, *, has_answered: bool) -> str:
    """What the server does now, in a few words."""
    if look.readiness == "absent":
        return (
            "the server does not answer any more"
            if has_answered
            else "no server answers yet (`turnout serve` starts one)"
        )
    if look.replicas is None:
        return "the server answers, and cannot say yet how its engine is"
    if not look.replicas:
        return "no engine was started yet"
    return "; ".join(f"{replica.id} {_doing(replica)}" for replica in look.replicas)


def _doing(replica: Replica) -> str:
    match replica.state:
        case "starting":
            return "is starting"
        case "testing":
            return "does its self-test" if replica.self_test in ("pending", "running") else "loads its adapters"
        case "failed":
            return "failed and will be started again"
        case "ready":
            return "is ready"
        case state:
            return f"is {state}"


def news(replicas: Sequence[Replica], known: Mapping[str, int]) -> list[str]:
    """A line for each replica that failed since the last look, however often; at the first look for all it has done so far."""
    lines = []
    for replica in replicas:
        if replica.state != "ready" and replica.failures > known.get(replica.id, 0):
            times = "once" if replica.failures == 1 else f"{replica.failures} times in a row"
            lines.append(f"{replica.id} failed {times}; the last time: {replica.last_failure}")
    return lines


def hopeless(replicas: Sequence[Replica], first_known: Mapping[str, int]) -> Replica | None:
    """One of the replicas when all of them fail for good, and were seen to fail."""
    if not replicas:
        return None
    is_final = all(
        replica.futile_starts >= FUTILE_STARTS and replica.failures > first_known.get(replica.id, 0)
        for replica in replicas
    )
    return replicas[0] if is_final else None


# ---- Waiting --------------------------------------------------------------------------------------------------------


def wait_ready(shell: Session, client: Client, *, timeout_s: float | None) -> None:
    """Until completions are served. Raises `GatewayError` when they will not be, or `timeout_s` is over."""
    with shell.waiting(f"Waiting for {client.url}") as tell:
        waiter = _Waiter(shell, client, Patience(timeout_s, STALLED_AFTER_S))

        def look() -> bool | None:
            found = waiter.look()
            words = waiter.words(found)
            if words is not None:
                tell(words)
            waiter.check(found)
            return True if found.readiness == "ready" else None

        if poll(look, patience=waiter.patience) is None:
            raise GatewayError(
                f"{client.url} serves no requests: {waiter.patience.why}; {waiter.doing}. `turnout doctor` says what is "
                "missing, the server says on its own terminal what it does, and the engine's log is logs/engine-0.log in "
                "the server's home",
                code="not_ready",
            )


@dataclass
class EngineWatch:
    """Tells each failure of an engine once to whoever waits for it, and ends the wait when another start is of no use."""

    shell: Session
    _known: dict[str, int] = field(default_factory=dict)
    _first_known: dict[str, int] = field(default_factory=dict)

    def check(self, replicas: Sequence[Replica]) -> None:
        """Look at the rows. Raises `GatewayError` when the engine fails for good."""
        for line in news(replicas, self._known):
            self.shell.say(f"[yellow]{escape(line)}[/]")
        for replica in replicas:
            first = self._first_known.get(replica.id, replica.failures)
            # A count that fell was another server's, or of an outage that is over.
            self._first_known[replica.id] = min(first, replica.failures)
            self._known[replica.id] = replica.failures
        lost = hopeless(replicas, self._first_known)
        if lost is not None:
            raise _given_up(lost)


@dataclass
class _Waiter:
    """What was seen so far."""

    shell: Session
    client: Client
    patience: Patience
    doing: str = ""
    _since: float = field(default_factory=time.monotonic)
    _answered_at: float | None = None
    _started_at: float = field(default_factory=time.monotonic)
    _seldom: Seldom = field(default_factory=Seldom)

    def __post_init__(self) -> None:
        self._engines = EngineWatch(self.shell)

    def look(self) -> Look:
        """Ask the server."""
        readiness = self.client.readiness()
        if readiness == "absent":
            return Look(readiness)
        self._answered_at = time.monotonic()
        try:
            return Look(readiness, tuple(self.client.replicas()))
        except (Unavailable, UpstreamFailed):  # its database is busy, or it is just going down
            return Look(readiness)

    def words(self, found: Look) -> str | None:
        """What to show now: at once when it changed, and how long it lasts as often as the terminal bears it."""
        now, said = time.monotonic(), doing(found, has_answered=self._answered_at is not None)
        if said != self.doing:
            self.doing, self._since, self._seldom = said, now, Seldom()
            return said
        lasted_s = now - self._since
        if self.shell.is_live or self._seldom.is_due(lasted_s):
            return f"{said}, {lasted_s:.0f} s"
        return None

    def check(self, found: Look) -> None:
        """Say what failed since the last look. Raises `GatewayError` when waiting is of no use."""
        self.patience.saw(found.sign)
        if found.readiness == "absent":
            self._check_presence()
        if found.readiness == "not_ready" and found.replicas is not None:
            self._engines.check(found.replicas)

    def _check_presence(self) -> None:
        now = time.monotonic()
        if self._answered_at is not None and now - self._answered_at > GONE_AFTER_S:
            raise Unavailable(
                f"the server at {self.client.url} is gone: it answered, and does not any more for {GONE_AFTER_S:.0f} s; its own "
                "terminal says why, and `turnout serve` starts it again",
                code="server_gone",
            )
        if self._answered_at is None and now - self._started_at > ABSENT_AFTER_S:
            raise Unavailable(
                f"no server answered at {self.client.url} for {ABSENT_AFTER_S:.0f} s; start one with `turnout serve`, or say "
                "where it is with --url or TURNOUT_URL",
                code="no_server",
            )


def _given_up(replica: Replica) -> GatewayError:
    return GatewayError(
        f"{replica.id} failed {replica.failures} times in a row and never served, so its next start will most likely end the "
        f"same way: {replica.last_failure}. `turnout doctor` on the server says what is missing, and its log "
        f"logs/{replica.id}.log in the server's home has the engine's own words. Mend that and run `turnout status --wait` "
        "again: the server goes on starting it",
        code="engine_never_ready",
    )
