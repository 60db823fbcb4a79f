"""How the client speaks to a server: connections, errors as the exceptions that they came from, moves sent until answered."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

import httpx
from pydantic import ValidationError

from .client_models import Answer
from .errors import (
    Conflict,
    Forbidden,
    GatewayError,
    Invalid,
    NotFound,
    Refused,
    StorageFull,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UpstreamFailed,
)

DEFAULT_URL = "http://127.0.0.1:8321"
CONNECT_ATTEMPTS = 3
# Pauses before a move is sent again whose reply was lost: a gateway that died is back within seconds.
REPEAT_AFTER_S = (0.2, 0.5, 1.0, 2.0, 4.0)
LOST_REPLY = ("connection_lost", "timeout", "no_server")
_ERRORS: dict[int, type[GatewayError]] = {
    400: Invalid,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    405: Invalid,
    409: Conflict,
    413: TooLarge,
    422: Refused,
    429: Unavailable,
    502: UpstreamFailed,
    503: Unavailable,
    504: UpstreamFailed,
    507: StorageFull,
}

AnswerT = TypeVar("AnswerT", bound=Answer)


class Wire:
    """One server, spoken to with one key."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 120,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = _checked_url(url or os.environ.get("TURNOUT_URL") or DEFAULT_URL)
        key = api_key or os.environ.get("TURNOUT_API_KEY")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout_s, connect=5),
            transport=transport or httpx.HTTPTransport(retries=CONNECT_ATTEMPTS - 1),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _one(
        self, kind: type[AnswerT], path: str, *, method: str = "GET", body: Mapping[str, Any] | None = None
    ) -> AnswerT:
        return read_answer(kind, self._send(method, path, json=_without_none(body) if body is not None else None))

    def _move(
        self, kind: type[AnswerT], path: str, body: Mapping[str, Any], *, method: str = "POST", key: str | None
    ) -> AnswerT:
        """Send a move until its reply is here: with its key the server makes it once, however often it arrives."""
        key = key or str(uuid4())
        options = {"json": _without_none(body), "headers": {"idempotency-key": key}}
        was_sent = False
        for pause_s in (*REPEAT_AFTER_S, None):
            try:
                return read_answer(kind, self._send(method, path, **options))
            except (Unavailable, UpstreamFailed) as error:
                if error.code not in LOST_REPLY or (error.code == "no_server" and not was_sent):
                    raise
                was_sent = True
                if pause_s is None:
                    raise _lost(error, key) from error
                time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _list(self, kind: type[AnswerT], path: str, *, params: Mapping[str, Any] | None = None) -> list[AnswerT]:
        answer = self._send("GET", path, params=params)
        found = json_of(answer)
        rows = found["data"] if isinstance(found, dict) and "data" in found else found
        return [validated(kind, row, answer) for row in rows]

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, path, **options)
        except httpx.ConnectError as error:
            raise Unavailable(
                f"no Turnout server answers at {self.url}; start one with `turnout serve`, or say where it is with "
                "--url or TURNOUT_URL",
                code="no_server",
            ) from error
        except httpx.TimeoutException as error:
            raise Unavailable(
                f"{self.url}{path} did not answer in time; it may still be at work", code="timeout"
            ) from error
        except httpx.TransportError as error:
            raise UpstreamFailed(
                f"the connection to {self.url}{path} broke: {error}", code="connection_lost"
            ) from error
        if answer.is_success:
            return answer
        raise _error(answer)


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise Invalid(f"{url!r} is not an http URL such as {DEFAULT_URL}", code="bad_url", param="url")
    return url.rstrip("/")


def _lost(error: GatewayError, key: str) -> GatewayError:
    """The error of a move of which nobody here knows whether it was made."""
    return type(error)(
        f"{error.message}. The move may have been made: `turnout routes show` tells. To ask for the answer without moving "
        f"twice, repeat the same command with --idempotency-key {key}",
        code=error.code,
    )


def _without_none(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def json_of(answer: httpx.Response) -> Any:
    """The body as JSON, or `UpstreamFailed`."""
    try:
        return answer.json()
    except ValueError as error:
        raise not_turnout(answer) from error


def read_answer(kind: type[AnswerT], answer: httpx.Response) -> AnswerT:
    """The body as one answer."""
    return validated(kind, json_of(answer), answer)


def validated(kind: type[AnswerT], found: Any, answer: httpx.Response) -> AnswerT:
    """What was found, as an answer; `UpstreamFailed` when it is none."""
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise not_turnout(answer) from error


def not_turnout(answer: httpx.Response) -> GatewayError:
    """The error of a body that this client cannot read."""
    return UpstreamFailed(
        f"{answer.request.url} answered {answer.status_code} with something this client cannot read; "
        "is it a Turnout server of this version?",
        code="unreadable_answer",
    )


def _error(answer: httpx.Response) -> GatewayError:
    """The server's own words as the exception they came from."""
    kind = _ERRORS.get(answer.status_code, UpstreamFailed if answer.status_code >= 500 else Invalid)
    try:
        said = answer.json()["error"]
        return kind(str(said["message"]), code=said.get("code") or kind.code, param=said.get("param"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return kind(f"{answer.request.url} answered {answer.status_code}: {answer.text[:200]}")
