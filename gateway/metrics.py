"""Every Prometheus collector of the gateway, in a registry of its own. Labels are bounded: see `MAX_SERIES`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

# Distinct (route, variant, traffic) that get labels of their own; those that come later share the label `other`.
MAX_SERIES = 300
OTHER = "other"
_LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TRAFFIC = ("route", "variant", "version", "traffic")


@dataclass(frozen=True)
class Finished:
    """What is measured of one completion."""

    status: int
    latency_s: float
    first_token_s: float | None
    prompt_tokens: int
    completion_tokens: int


class TrafficMetrics:
    """The collectors of one (route, variant, version, traffic), looked up once and kept."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str, str]) -> None:
        self._requests = metrics.requests
        self._labels = labels
        self._by_status: dict[int, Counter] = {}
        self._latency = metrics.latency.labels(*labels)
        self._first_token = metrics.first_token.labels(*labels)
        self._prompt = metrics.tokens.labels(*labels, "prompt")
        self._completion = metrics.tokens.labels(*labels, "completion")

    def finish(self, seen: Finished) -> None:
        """Count one completion, whatever became of it."""
        counter = self._by_status.get(seen.status)
        if counter is None:
            counter = self._by_status[seen.status] = self._requests.labels(*self._labels, str(seen.status))
        counter.inc()
        self._latency.observe(seen.latency_s)
        if seen.first_token_s is not None:
            self._first_token.observe(seen.first_token_s)
        if seen.prompt_tokens:
            self._prompt.inc(seen.prompt_tokens)
        if seen.completion_tokens:
            self._completion.inc(seen.completion_tokens)


class Metrics:
    """The gateway's collectors."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a third of all series, and nothing reads them
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "turnout_requests_total", "Completions by what answered them", (*_TRAFFIC, "status"), registry=registry
        )
        self.latency = Histogram(
            "turnout_request_seconds",
            "Time from request to the end of its answer",
            _TRAFFIC,
            registry=registry,
            buckets=_LATENCY_BUCKETS,
        )
        self.first_token = Histogram(
            "turnout_first_token_seconds",
            "Time from request to the first streamed token",
            _TRAFFIC,
            registry=registry,
            buckets=_LATENCY_BUCKETS,
        )
        self.tokens = Counter(
            "turnout_tokens_total", "Tokens read (prompt) and made (completion)", (*_TRAFFIC, "kind"), registry=registry
        )
        self.refused = Counter(
            "turnout_refused_requests_total",
            "Completions refused before any engine saw them",
            ("code",),
            registry=registry,
        )
        self.upstream_errors = Counter(
            "turnout_engine_errors_total", "Requests that an engine failed", ("code",), registry=registry
        )
        self.unhandled = Counter(
            "turnout_unhandled_errors_total", "Faults of the gateway itself", ("where",), registry=registry
        )
        self.connections = Gauge(
            "turnout_connections",
            "Open connections: `known` have shown a key that counts, `stranger` have not",
            ("kind",),
            registry=registry,
        )
        self.connections_limit = Gauge(
            "turnout_connections_limit",
            "Connections there may be at once, by setting and file limit",
            registry=registry,
        )
        self.connections_cut = Counter(
            "turnout_connections_cut_total",
            "Connections cut to make room: strangers of an `address` with too many, of all `strangers`, for want of `files`; "
            "known ones that were `idle`; `full`: a key was told to come back",
            ("reason",),
            registry=registry,
        )
        self.in_flight = Gauge("turnout_requests_in_flight", "Requests being answered now", registry=registry)
        self.exposures_written = Counter(
            "turnout_exposures_written_total", "Exposure records stored", registry=registry
        )
        self.exposures_dropped = Counter(
            "turnout_exposures_dropped_total", "Exposure records given up for want of room", registry=registry
        )
        self.table_revision = Gauge(
            "turnout_routing_revision", "Revision of the routing table in use", registry=registry
        )
        self.table_age = Gauge(
            "turnout_routing_age_seconds", "Time since the database last confirmed the routing table", registry=registry
        )
        self.table_failures = Gauge(
            "turnout_routing_failures",
            "Failed refreshes, failed saves and refused files since the start",
            ("kind",),
            registry=registry,
        )
        self.versions = Gauge("turnout_adapter_versions", "Adapter versions by state", ("state",), registry=registry)
        self.residency = Gauge(
            "turnout_adapters_resident", "Adapter versions on engine replicas by state", ("state",), registry=registry
        )
        self.replicas = Gauge("turnout_replicas", "Engine replicas by state", ("state",), registry=registry)
        self.jobs = Gauge("turnout_jobs", "Jobs by kind and state", ("kind", "state"), registry=registry)
        self.verdicts = Gauge(
            "turnout_gate_verdicts", "Gate verdicts by suite and outcome", ("suite", "verdict"), registry=registry
        )
        self.table_rows = Gauge(
            "turnout_table_rows", "About how many rows a table that grows has", ("table",), registry=registry
        )
        self.deleted = Gauge(
            "turnout_retention_deleted", "Rows and files that retention ever removed", ("kind",), registry=registry
        )
        self._traffic: dict[tuple[str, str, str], TrafficMetrics] = {}

    def traffic(self, route: str, variant: str, traffic: str) -> TrafficMetrics:
        """Collectors for requests that `variant` answers for `route`; a target's name is also its version's."""
        key = (route, variant, traffic)
        found = self._traffic.get(key)
        if found is not None:
            return found
        if len(self._traffic) >= MAX_SERIES:
            key = (OTHER, OTHER, traffic)
            if key in self._traffic:
                return self._traffic[key]
        made = self._traffic[key] = TrafficMetrics(self, (key[0], key[1], key[1], key[2]))
        return made

    def set_counts(self, gauge: Gauge, counts: Mapping[tuple[str, ...], int]) -> None:
        """Show exactly these counts: a label that is gone goes; beyond `MAX_SERIES` the rest is summed up as `other`."""
        gauge.clear()
        shown = sorted(counts.items())
        for labels, count in shown[:MAX_SERIES]:
            gauge.labels(*labels).set(count)
        for labels, count in shown[MAX_SERIES:]:
            gauge.labels(*(OTHER for _ in labels)).inc(count)

    def render(self) -> bytes:
        """The exposition in Prometheus' text format."""
        return generate_latest(self.registry)
