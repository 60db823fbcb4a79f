"""A typed, synchronous client of a Turnout server: all of `/api`, and what a command line needs of `/v1`.

Answers keep fields this client does not know, so that an older client prints all that a newer server says.
Nothing is sent twice: only a connection that was never made is tried again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

import httpx
from pydantic import ValidationError

from .client_models import (
    Adapter,
    Answer,
    AuditEntry,
    Completion,
    GcReport,
    Job,
    JobEvent,
    Key,
    Moved,
    NewKey,
    Replica,
    Route,
    Suite,
    Version,
)
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
BUNDLE_FILES = {
    "adapter_config": "adapter_config.json",
    "adapter_model": "adapter_model.safetensors",
    "manifest": "manifest.json",
}
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


class Client:
    """One server, spoken to with one key. Use it as a context manager.

    Raises subclasses of `GatewayError` with the server's message and reason code.
    """

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

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # ---- adapters --------------------------------------------------------------------------------------------------

    def publish(self, adapter: str, directory: Path) -> Version:
        """Upload a bundle or a plain PEFT folder as a version of `adapter`; the same bytes give the same version."""
        with ExitStack() as stack:
            files = {
                field: (name, stack.enter_context((directory / name).open("rb")), "application/octet-stream")
                for field, name in BUNDLE_FILES.items()
                if (directory / name).is_file()
            }
            missing = [BUNDLE_FILES[field] for field in ("adapter_config", "adapter_model") if field not in files]
            if missing:
                raise Invalid(
                    f"{directory} has no {' and no '.join(missing)}; name the folder that `turnout train` or PEFT wrote",
                    code="not_a_bundle",
                    param="directory",
                )
            answer = self._send("POST", f"/api/adapters/{adapter}/versions", files=files)
        return _read(Version, answer)

    def adapters(self) -> list[Adapter]:
        """Every adapter with its versions."""
        return self._list(Adapter, "/api/adapters")

    def adapter(self, name: str) -> Adapter:
        """One adapter with its versions."""
        return self._one(Adapter, f"/api/adapters/{name}")

    def version(self, target: str) -> Version:
        """One version by its name, such as `support@3`."""
        adapter, number = split_target(target)
        return self._one(Version, f"/api/adapters/{adapter}/versions/{number}")

    # ---- routes ----------------------------------------------------------------------------------------------------

    def routes(self) -> list[Route]:
        """Every route."""
        return self._list(Route, "/api/routes")

    def route(self, name: str) -> Route:
        """One route."""
        return self._one(Route, f"/api/routes/{name}")

    def set_variants(
        self,
        route: str,
        weights: Mapping[str, int],
        *,
        force: bool = False,
        reason: str | None = None,
        expected_revision: int | None = None,
    ) -> Route:
        """Split a route's traffic; with `expected_revision`, only if nobody moved it since."""
        body = {
            "variants": [{"target": target, "weight": weight} for target, weight in weights.items()],
            "force": force or None,
            "reason": reason,
            "expected_revision": expected_revision,
        }
        return self._one(Route, f"/api/routes/{route}/variants", method="PUT", body=body)

    def set_gates(self, route: str, suites: Iterable[str]) -> Route:
        """Name the suites that a version must pass before it is promoted on this route."""
        return self._one(Route, f"/api/routes/{route}/gates", method="PUT", body={"suites": list(suites)})

    def promote(
        self, route: str, target: str | None = None, *, force: bool = False, reason: str | None = None
    ) -> Moved:
        """Send all of a route's traffic to a version whose gates passed."""
        body = {"target": target, "force": force, "reason": reason}
        return self._one(Moved, f"/api/routes/{route}/promote", method="POST", body=body)

    def rollback(self, route: str, *, to: str | None = None, force: bool = False, reason: str | None = None) -> Moved:
        """Send all of a route's traffic back to where it was before."""
        body = {"to": to, "force": force, "reason": reason}
        return self._one(Moved, f"/api/routes/{route}/rollback", method="POST", body=body)

    # ---- suites, evaluations, jobs ---------------------------------------------------------------------------------

    def suites(self) -> list[Suite]:
        """Suites that this server knows."""
        return self._list(Suite, "/api/suites")

    def evaluate(self, target: str, suite: str, *, larger_look: bool = False) -> Job:
        """Start an evaluation of a version."""
        body = {"target": target, "suite": suite, "larger_look": larger_look}
        return self._one(Job, "/api/evaluations", method="POST", body=body)

    def evaluations(self, target: str | None = None) -> list[Job]:
        """Evaluations, newest first."""
        return self._list(Job, "/api/evaluations", params={"target": target} if target else None)

    def evaluation(self, job_id: str) -> Job:
        """One evaluation with its report."""
        return self._one(Job, f"/api/evaluations/{job_id}")

    def jobs(self) -> list[Job]:
        """Jobs of every kind, newest first."""
        return self._list(Job, "/api/jobs")

    def job(self, job_id: str) -> Job:
        """One job."""
        return self._one(Job, f"/api/jobs/{job_id}")

    def job_events(self, job_id: str) -> list[JobEvent]:
        """What a job said, oldest first."""
        return self._list(JobEvent, f"/api/jobs/{job_id}/events")

    def cancel_job(self, job_id: str) -> Job:
        """Ask a job to stop."""
        return self._one(Job, f"/api/jobs/{job_id}/cancel", method="POST")

    # ---- keys, audit, the server itself ----------------------------------------------------------------------------

    def keys(self) -> list[Key]:
        """Keys, without their secrets."""
        return self._list(Key, "/api/keys")

    def create_key(self, name: str, scopes: Iterable[str], *, expires_at: datetime | None = None) -> NewKey:
        """Make a key; its secret is in this answer and nowhere else."""
        body = {"name": name, "scopes": list(scopes), "expires_at": expires_at.isoformat() if expires_at else None}
        return self._one(NewKey, "/api/keys", method="POST", body=body)

    def revoke_key(self, key_id: str) -> None:
        """Make a key useless at once."""
        self._send("DELETE", f"/api/keys/{key_id}")

    def audit(self, *, subject: str | None = None, limit: int = 50) -> list[AuditEntry]:
        """The audit log, newest first."""
        params: dict[str, Any] = {"limit": limit} | ({"subject": subject} if subject else {})
        return self._list(AuditEntry, "/api/audit", params=params)

    def collect(self, *, dry_run: bool) -> GcReport:
        """Remove what is over, or only say what that would be."""
        return self._one(GcReport, "/api/gc", method="POST", body={"dry_run": dry_run})

    def replicas(self) -> list[Replica]:
        """Copies of the engine."""
        return self._list(Replica, "/api/replicas")

    def is_ready(self) -> bool:
        """Whether completions are served now."""
        return self.readiness() == "ready"

    def readiness(self) -> Literal["ready", "not_ready", "absent"]:
        """Whether completions are served now; `absent` when nobody listens there at all."""
        try:
            served = self._http.get("/readyz", timeout=5).status_code == httpx.codes.OK
        except httpx.ConnectError:
            return "absent"
        except httpx.TransportError:
            return "not_ready"
        return "ready" if served else "not_ready"

    def models(self) -> list[str]:
        """Names that a request may put in `model`."""
        return [str(row["id"]) for row in _json(self._send("GET", "/v1/models"))["data"]]

    def chat(
        self, model: str, text: str, *, system: str | None = None, user: str | None = None, **options: Any
    ) -> Completion:
        """One chat turn, with the headers that prove which weights answered."""
        messages = [{"role": "system", "content": system}] if system else []
        body = {"model": model, "messages": [*messages, {"role": "user", "content": text}], **options}
        answer = self._send("POST", "/v1/chat/completions", json=body | ({"user": user} if user else {}))
        return _completion(answer)

    # ---- the wire --------------------------------------------------------------------------------------------------

    def _one(
        self, kind: type[AnswerT], path: str, *, method: str = "GET", body: Mapping[str, Any] | None = None
    ) -> AnswerT:
        return _read(kind, self._send(method, path, json=_without_none(body) if body is not None else None))

    def _list(self, kind: type[AnswerT], path: str, *, params: Mapping[str, Any] | None = None) -> list[AnswerT]:
        answer = self._send("GET", path, params=params)
        found = _json(answer)
        rows = found["data"] if isinstance(found, dict) and "data" in found else found
        return [_validated(kind, row, answer) for row in rows]

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


def split_target(target: str) -> tuple[str, str]:
    """`support@3` as ("support", "3")."""
    adapter, separator, number = target.partition("@")
    if not separator or not adapter or not number.isdigit():
        raise Invalid(
            f"{target!r} does not name a version; write adapter@number, such as support@1",
            code="bad_target",
            param="target",
        )
    return adapter, number


def _checked_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise Invalid(f"{url!r} is not an http URL such as {DEFAULT_URL}", code="bad_url", param="url")
    return url.rstrip("/")


def _without_none(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise _not_turnout(answer) from error


def _read(kind: type[AnswerT], answer: httpx.Response) -> AnswerT:
    return _validated(kind, _json(answer), answer)


def _validated(kind: type[AnswerT], found: Any, answer: httpx.Response) -> AnswerT:
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise _not_turnout(answer) from error


def _not_turnout(answer: httpx.Response) -> GatewayError:
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


def _completion(answer: httpx.Response) -> Completion:
    body = _json(answer)
    headers = {name: answer.headers.get(f"x-turnout-{name}", "") for name in ("route", "variant", "version", "digest")}
    try:
        text = body["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise _not_turnout(answer) from error
    found = {"text": text, "request_id": answer.headers.get("x-request-id", ""), "usage": body.get("usage"), **headers}
    return _validated(Completion, found, answer)
