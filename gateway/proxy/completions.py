"""One completion, from the client's bytes to the last byte of its answer.

Read the body, check it, choose what answers, send the rebuilt body to the engine, pass the answer on under the name
the client used, count it. Whatever cuts this short (the client goes, a deadline, an engine's death, a shutdown) ends
the engine's work at once and the client's answer honestly: an error, and never a `[DONE]` that the engine did not say.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection
from time import monotonic, perf_counter

import orjson
import structlog

from ..engine.client import MAX_REFUSAL_BYTES, EngineAnswer, EngineClient, EngineClients, EngineUnreachable
from ..errors import GatewayError, Invalid, Unavailable, UpstreamFailed
from ..metrics import Metrics
from ..routing.snapshot import SnapshotReplica
from ..routing.table import RoutingTable
from .answers import StreamRewriter, engine_error, rewrite_whole
from .asgi import ClientGone, Headers, Receive, Scope, Send, header, late
from .bodies import Bodies
from .checks import Bounds
from .cutting import Cutter, Cutters, Reason, Timeouts
from .errors import render, sse_event, status_of
from .exchange import Exchange
from .fields import Asked, Endpoint, RebuiltRequest
from .recorder import Recorder
from .resolution import Answering, resolve

log = structlog.get_logger(__name__)

PATHS: dict[str, Endpoint] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
CLIENT_GONE = 499
_MAX_STICKY_BYTES = 512
_LAST_BYTES_TIMEOUT_S = 1.0
_STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Completions:
    """The two completion endpoints."""

    def __init__(
        self,
        table: RoutingTable,
        engines: EngineClients,
        recorder: Recorder,
        metrics: Metrics,
        *,
        bounds: Bounds,
        secret: bytes,
        bodies: Bodies,
        timeouts: Timeouts,
    ) -> None:
        self._table = table
        self._engines = engines
        self._recorder = recorder
        self._metrics = metrics
        self._bounds = bounds
        # One secret, two uses that must not be mistaken for one another.
        self._unit_secret = hmac.digest(secret, b"turnout sticky key", "sha256")
        self._salt_secret = hmac.digest(secret, b"turnout cache salt", "sha256")
        self._salts: dict[str, str] = {}
        self.bodies = bodies
        self._cutters = Cutters(timeouts)

    def cut_all(self, reason: Reason) -> None:
        """End every open request: streams with an error event, the others with an error."""
        self._cutters.cut_all(reason)

    def cut_variants(self, variants: Collection[str]) -> int:
        """End every open answer of these variants, as `cut_all` does; how many there were."""
        return self._cutters.cut_variants(variants)

    async def answer(self, endpoint: Endpoint, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens."""
        cutter = self._cutters.open()
        try:
            failure = await self._try(endpoint, exchange, cutter, scope, receive, send)
            cutter.close()
            if failure is not None:
                await self._report(exchange, failure, send)
        finally:
            self._cutters.close(cutter)
            self._count(exchange)

    async def _try(
        self, endpoint: Endpoint, exchange: Exchange, cutter: Cutter, scope: Scope, receive: Receive, send: Send
    ) -> GatewayError | None:
        """Answer; what went wrong is returned, unless there is nobody left to hear it."""
        try:
            await self._answer(endpoint, exchange, cutter, scope, receive, send)
        except GatewayError as error:
            return error
        except ClientGone:
            exchange.status = CLIENT_GONE
        except asyncio.CancelledError:
            reason = cutter.take_back()
            if reason is None:
                raise
            # To a client whose buffer is full nothing can be said; the server closes an answer that is not complete.
            if reason in _REPORTED and cutter.sending_since is None:
                return _REPORTED[reason]
            exchange.status = CLIENT_GONE
        except Exception:
            log.exception("completion failed", request_id=exchange.request_id)
            self._metrics.unhandled.labels("completions").inc()
            return GatewayError(f"the gateway failed on request {exchange.request_id}; the cause is in its log")
        return None

    async def _answer(
        self, endpoint: Endpoint, exchange: Exchange, cutter: Cutter, scope: Scope, receive: Receive, send: Send
    ) -> None:
        principal = exchange.principal
        principal.require("inference")
        asked = Asked(endpoint, self._bounds, "evaluate" in principal.scopes, _sticky_header(scope))
        request = await self.bodies.read(asked, scope, receive, holder=principal.key_id, on_whole=cutter.body_is_whole)
        exchange.unit = self._unit(exchange, request.sticky)
        exchange.answering = resolve(self._table.current, request.model, principal, exchange.unit)
        cutter.variant = exchange.answering.variant
        watcher = asyncio.ensure_future(_disconnected(receive))
        watcher.add_done_callback(lambda done: None if done.cancelled() else cutter.cut("disconnect"))
        try:
            with self._recorder.using(exchange.answering.variant):
                await self._converse(scope["path"], request, exchange.answering, exchange, cutter, send)
        finally:
            watcher.cancel()

    async def _converse(
        self,
        path: str,
        request: RebuiltRequest,
        answering: Answering,
        exchange: Exchange,
        cutter: Cutter,
        send: Send,
    ) -> None:
        payload = self._payload(request, answering, exchange)
        client, answer = await self._ask(path, payload, answering, exchange)
        try:
            if answer.status != 200:
                raise engine_error(
                    answer.status,
                    await answer.read(max_bytes=MAX_REFUSAL_BYTES),
                    engine_name=answering.engine_name,
                    asked_name=request.model,
                )
            if request.is_stream:
                await _pass_stream(answer, request, answering, exchange, cutter, send)
            else:
                await _pass_whole(answer, request, answering, exchange, cutter, send)
        except UpstreamFailed:
            # An answer that is not this request's may be one of a row that is out of step.
            answer.distrust()
            raise
        finally:
            client.in_flight -= 1
            answer.release()

    async def _ask(
        self, path: str, payload: bytes, answering: Answering, exchange: Exchange
    ) -> tuple[EngineClient, EngineAnswer]:
        """Ask the least busy replica; another one only when that one cannot have seen a byte of it."""
        failure: GatewayError | None = None
        for replica, client in self._by_load(answering.replicas):
            exchange.replica_id = replica.id
            client.in_flight += 1
            try:
                return client, await client.post(path, payload)
            except EngineUnreachable as error:
                client.in_flight -= 1
                failure = error
            except BaseException:
                client.in_flight -= 1
                raise
        raise failure or UpstreamFailed("no engine serves it")

    def _by_load(self, replicas: tuple[SnapshotReplica, ...]) -> list[tuple[SnapshotReplica, EngineClient]]:
        pairs = [(replica, self._engines.client(replica.id, replica.socket, replica.epoch)) for replica in replicas]
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: pair[1].in_flight)
        return pairs

    def _payload(self, request: RebuiltRequest, answering: Answering, exchange: Exchange) -> bytes:
        ending = {
            "model": answering.engine_name,
            "cache_salt": self._cache_salt(exchange.principal.project_id),
            "request_id": exchange.request_id,
        }
        return b"%b,%b" % (request.opening, orjson.dumps(ending)[1:])

    def _cache_salt(self, project_id: str) -> str:
        found = self._salts.get(project_id)
        if found is None:
            found = self._salts[project_id] = hmac.digest(self._salt_secret, project_id.encode(), "sha256").hex()
        return found

    def _unit(self, exchange: Exchange, sticky: str | None) -> str:
        """The unit of assignment. A client's own key is kept only in this form."""
        keyed = f"{exchange.principal.project_id}\x00{sticky}" if sticky is not None else f"\x00{exchange.request_id}"
        return hmac.digest(self._unit_secret, keyed.encode(), "sha256").hex()

    async def _report(self, exchange: Exchange, error: GatewayError, send: Send) -> None:
        if exchange.answering is None:
            self._metrics.refused.labels(error.code).inc()
        elif isinstance(error, UpstreamFailed):
            self._metrics.upstream_errors.labels(error.code).inc()
            log.warning("engine failed a request", code=error.code, error=error.message, request_id=exchange.request_id)
        if exchange.is_begun:
            exchange.status = status_of(error)
            await send({"type": "http.response.body", "body": sse_event(error), "more_body": False})
            return
        status, headers, body = render(error)
        await exchange.begin(status, headers, send)
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _count(self, exchange: Exchange) -> None:
        answering = exchange.answering
        if answering is None:
            return
        traffic = self._metrics.traffic(answering.route, answering.variant, exchange.traffic)
        traffic.finish(exchange.finished())
        exposure = exchange.exposure()
        if exposure is not None:
            self._recorder.record(exposure)


_REPORTED: dict[Reason, GatewayError] = {
    "deadline": Unavailable("the answer took longer than limits.request_timeout_s", code="request_timeout"),
    "body_timeout": late(),
    "shutdown": Unavailable("the gateway is stopping; try again", code="shutting_down"),
    "rolled_back": Unavailable("the version that was answering was rolled back; ask again", code="answer_rolled_back"),
}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _pass_whole(
    answer: EngineAnswer,
    request: RebuiltRequest,
    answering: Answering,
    exchange: Exchange,
    cutter: Cutter,
    send: Send,
) -> None:
    content = rewrite_whole(
        await answer.read(),
        engine_name=answering.engine_name,
        asked_name=request.model,
        seen=exchange.seen,
        request_id=exchange.request_id,
    )
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await exchange.begin(200, headers, send)
    cutter.sending_since = monotonic()
    await send({"type": "http.response.body", "body": content, "more_body": False})
    cutter.close()


async def _pass_stream(
    answer: EngineAnswer,
    request: RebuiltRequest,
    answering: Answering,
    exchange: Exchange,
    cutter: Cutter,
    send: Send,
) -> None:
    rewriter = StreamRewriter(
        engine_name=answering.engine_name,
        asked_name=request.model,
        wants_usage=request.wants_usage,
        seen=exchange.seen,
        request_id=exchange.request_id,
    )
    async for data in answer.parts():
        events = rewriter.feed(data)
        if not events:
            continue
        if not exchange.is_begun:
            # Not before the first event: until then a failure can still be told by the status.
            exchange.first_token_at = perf_counter()
            await exchange.begin(200, _STREAM_HEADERS, send)
        # The server waits here while the client's buffer is full, and no more is read from the engine meanwhile.
        cutter.sending_since = monotonic()
        await send({"type": "http.response.body", "body": events, "more_body": not rewriter.is_done})
        cutter.sending_since = None
        if rewriter.is_done:
            break
    if not rewriter.is_done:
        raise UpstreamFailed("the engine broke off its answer; try again", code="engine_error")
    cutter.close()
    if rewriter.has_surplus:
        answer.distrust()
    else:
        # With the last bytes of HTTP's framing the connection can be used again.
        await answer.ended(_LAST_BYTES_TIMEOUT_S)


def _sticky_header(scope: Scope) -> str | None:
    value = header(scope, b"x-turnout-key")
    if value is None:
        return None
    if not 0 < len(value) <= _MAX_STICKY_BYTES:
        raise Invalid(f"the header `x-turnout-key` must have 1 to {_MAX_STICKY_BYTES} bytes", param="x-turnout-key")
    return value.decode("latin-1")
