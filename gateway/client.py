"""A typed, synchronous client of a Turnout server: all of `/api`, and what a command line needs of `/v1`.

Answers keep fields this client does not know, so that an older client prints all that a newer server says.
Nothing is sent twice but moves of traffic, which carry an idempotency key: the server makes such a move once, and
answers a repeat as it answered the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import httpx

from .client_models import (
    Adapter,
    AuditEntry,
    Completion,
    GcReport,
    Job,
    JobEvent,
    Key,
    Moved,
    NewKey,
    Readiness,
    Replica,
    Route,
    RouteMoved,
    Suite,
    Version,
)
from .client_wire import DEFAULT_URL, Wire, json_of, not_turnout, read_answer, validated
from .errors import Invalid

__all__ = ["DEFAULT_URL", "Client", "split_target"]
BUNDLE_FILES = {
    "adapter_config": "adapter_config.json",
    "adapter_model": "adapter_model.safetensors",
    "manifest": "manifest.json",
}


class Client(Wire):
    """One server, spoken to with one key. Use it as a context manager.

    Raises subclasses of `GatewayError` with the server's message and reason code.
    """

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
        return read_answer(Version, answer)

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

    def release(self, target: str, *, reason: str) -> Version:
        """Out of quarantine: the version is verified once more, then loaded and probed like a new one."""
        return self._act(target, "release", reason)

    def retire(self, target: str, *, reason: str) -> Version:
        """Engines load the version no more; its bytes go when none can need them."""
        return self._act(target, "retire", reason)

    def restore(self, target: str, *, reason: str) -> Version:
        """Bring a retired version back, if its bytes are still there."""
        return self._act(target, "restore", reason)

    def _act(self, target: str, act: str, reason: str) -> Version:
        adapter, number = split_target(target)
        path = f"/api/adapters/{adapter}/versions/{number}/{act}"
        return self._one(Version, path, method="POST", body={"reason": reason})

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
        tries: Iterable[str] | None = None,
        force: bool = False,
        reason: str | None = None,
        expected_revision: int | None = None,
        idempotency_key: str | None = None,
        dry_run: bool = False,
    ) -> RouteMoved:
        """Split a route's traffic; with `expected_revision`, only if nobody moved it since.

        `tries` names the arms that a rollback would take back; left out: every arm but stable.
        """
        body = {
            "variants": [{"target": target, "weight": weight} for target, weight in weights.items()],
            "tries": None if tries is None else list(tries),
            "force": force or None,
            "reason": reason,
            "expected_revision": expected_revision,
            "dry_run": dry_run or None,
        }
        return self._move(RouteMoved, f"/api/routes/{route}/variants", body, method="PUT", key=idempotency_key)

    def set_gates(self, route: str, suites: Iterable[str]) -> Route:
        """Name the suites that a version must pass before it is promoted on this route."""
        return self._one(Route, f"/api/routes/{route}/gates", method="PUT", body={"suites": list(suites)})

    def set_candidate(self, route: str, target: str | None, *, reason: str | None = None) -> Route:
        """Name the version that comes next: engines load it, traffic stays where it is."""
        body = {"target": target} | ({"reason": reason} if reason else {})
        return read_answer(Route, self._send("PUT", f"/api/routes/{route}/candidate", json=body))

    def promote(
        self,
        route: str,
        target: str | None = None,
        *,
        force: bool = False,
        reason: str | None = None,
        expected_revision: int | None = None,
        idempotency_key: str | None = None,
        dry_run: bool = False,
    ) -> Moved:
        """Send all of a route's traffic to a version whose gates passed."""
        body = {
            "target": target,
            "force": force,
            "reason": reason,
            "expected_revision": expected_revision,
            "dry_run": dry_run or None,
        }
        return self._move(Moved, f"/api/routes/{route}/promote", body, key=idempotency_key)

    def rollback(
        self,
        route: str,
        *,
        to: str | None = None,
        force: bool = False,
        further: bool = False,
        accept_load: bool = False,
        cut: bool = False,
        break_glass: bool = False,
        reason: str | None = None,
        expected_revision: int | None = None,
        idempotency_key: str | None = None,
        dry_run: bool = False,
    ) -> Moved:
        """End the route's trial; without one, send all its traffic back to `previous`; or to `to`.

        `further`: although the last move was a rollback. `accept_load`: also onto a version that no engine has loaded.
        `cut`: end the answers of what is left that still run. `break_glass`: also without the database.
        """
        body = {
            "to": to,
            "force": force,
            "further": further or None,
            "accept_load": accept_load or None,
            "cut": cut or None,
            "break_glass": break_glass or None,
            "reason": reason,
            "expected_revision": expected_revision,
            "dry_run": dry_run or None,
        }
        return self._move(Moved, f"/api/routes/{route}/rollback", body, key=idempotency_key)

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

    def health(self) -> Readiness:
        """What `/readyz` says, serving or not."""
        return read_answer(Readiness, self._http.get("/readyz", timeout=5))

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
        return [str(row["id"]) for row in json_of(self._send("GET", "/v1/models"))["data"]]

    def chat(
        self, model: str, text: str, *, system: str | None = None, user: str | None = None, **options: Any
    ) -> Completion:
        """One chat turn, with the headers that prove which weights answered."""
        messages = [{"role": "system", "content": system}] if system else []
        body = {"model": model, "messages": [*messages, {"role": "user", "content": text}], **options}
        answer = self._send("POST", "/v1/chat/completions", json=body | ({"user": user} if user else {}))
        return _completion(answer)


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


def _completion(answer: httpx.Response) -> Completion:
    body = json_of(answer)
    headers = {name: answer.headers.get(f"x-turnout-{name}", "") for name in ("route", "variant", "version", "digest")}
    try:
        text = body["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise not_turnout(answer) from error
    found = {"text": text, "request_id": answer.headers.get("x-request-id", ""), "usage": body.get("usage"), **headers}
    return validated(Completion, found, answer)
