"""What is known of one request while it is answered, and what is counted of it afterwards."""

from __future__ import annotations

from time import perf_counter

from ..ids import new_id, now
from ..keys import Principal
from ..metrics import Finished
from .answers import Seen
from .asgi import Headers, Send
from .recorder import Exposure
from .resolution import Answering


class Exchange:
    """One request and its answer."""

    __slots__ = (
        "answering",
        "first_token_at",
        "is_begun",
        "principal",
        "replica_id",
        "request_id",
        "seen",
        "started",
        "started_at",
        "status",
        "unit",
    )

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self.request_id = new_id("req-")
        self.started = perf_counter()
        self.started_at = now()
        self.answering: Answering | None = None
        self.unit = ""
        self.replica_id = ""
        self.status = 500
        self.is_begun = False
        self.first_token_at: float | None = None
        self.seen = Seen()

    @property
    def traffic(self) -> str:
        """Who asked for what: an evaluation, traffic that was assigned, or a name that leaves no choice."""
        if "evaluate" in self.principal.scopes:
            return "evaluation"
        return "assigned" if self.answering is not None and self.answering.is_assigned else "pinned"

    def headers(self) -> Headers:
        """What every answer carries: the request's id, and what answered, once that is known."""
        headers = [(b"x-request-id", self.request_id.encode())]
        if self.answering is not None:
            variant = self.answering.variant.encode()
            headers += [
                (b"x-turnout-route", self.answering.route.encode()),
                (b"x-turnout-variant", variant),
                (b"x-turnout-version", variant),
                (b"x-turnout-digest", self.answering.digest.encode()),
            ]
        return headers

    async def begin(self, status: int, headers: Headers, send: Send) -> None:
        """Send status and headers."""
        self.status = status
        self.is_begun = True
        await send({"type": "http.response.start", "status": status, "headers": [*headers, *self.headers()]})

    def finished(self) -> Finished:
        """What metrics take."""
        return Finished(
            self.status,
            perf_counter() - self.started,
            self._first_token_s,
            self.seen.prompt_tokens or 0,
            self.seen.completion_tokens or 0,
        )

    def exposure(self) -> Exposure | None:
        """What is recorded of an assigned request; None of others."""
        answering = self.answering
        if answering is None or not answering.is_assigned:
            return None
        return Exposure(
            request_id=self.request_id,
            project_id=self.principal.project_id,
            at=self.started_at,
            route=answering.route,
            variant=answering.variant,
            version=answering.variant,
            digest=answering.digest,
            unit=self.unit,
            replica_id=self.replica_id,
            status=self.status,
            finish_reason=self.seen.finish_reason,
            latency_s=perf_counter() - self.started,
            first_token_s=self._first_token_s,
            prompt_tokens=self.seen.prompt_tokens,
            completion_tokens=self.seen.completion_tokens,
        )

    @property
    def _first_token_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.started
