"""Prometheus metrics, read from the load table on each scrape.

Nothing is counted here: workers count on the hot path, in their cells of the load table. This
module maps the cells to metrics by the Publisher's rows. One scrape of the supervisor therefore
covers the whole KubeAI replica. Series are removed with their Model or endpoint; unknown model
names create none.

The supervisor owns one :class:`Metrics` and serves its output at ``metricsAddr``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from typing_extensions import override

import kubeai
from kubeai._load import ITERATION_BUCKETS, LoadTable
from kubeai._queue_table import QueueTable
from kubeai._readings import picks
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import RequestType, Route
from kubeai.supervisor.event_metrics import EventMetrics
from kubeai.supervisor.queue_metrics import QueueCollector
from kubeai.supervisor.scraped import Scraped
from kubeai.supervisor.usage.metrics import UsageCollector

REQUESTS = "kubeai_inference_requests"
_REQUEST_TYPES: tuple[RequestType, ...] = ("http", "message")


class Metrics:
    """All metrics of this KubeAI replica.

    ``peers``: seconds since each peer last reported its loads, by address. ``streams``:
    of the message streams; None: there are none. ``limits`` and ``usage``: of API keys; None: keys
    are not required. ``queues``: None: there are no queues.
    """

    def __init__(
        self,
        table: LoadTable,
        publisher: Publisher,
        peers: Callable[[], Mapping[str, float]] = dict,
        streams: Collector | None = None,
        limits: Collector | None = None,
        usage: UsageCollector | None = None,
        queues: QueueTable | None = None,
    ) -> None:
        waiting = None if queues is None else QueueCollector(queues, publisher)
        self._registry = CollectorRegistry()
        self._registry.register(LoadCollector(table, publisher, peers))
        self.events = EventMetrics(publisher.models)  # of what the workers report
        for collector in filter(None, (streams, limits, waiting, self.events)):
            self._registry.register(collector)
        self._usage = usage
        ProcessCollector(registry=self._registry)  # the supervisor's process

    def render(self, accept: str) -> tuple[bytes, str]:
        """(body, content type): Prometheus text or OpenMetrics, as the Accept header requests."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """Like :meth:`render`, with the usage of API keys.

        There may be 500,000 of its series, which take seconds. So a thread writes them.
        """
        body, content_type = self.render(accept)
        if self._usage is not None:
            registry = CollectorRegistry()
            registry.register(self._usage.frozen())
            encode, _ = choose_encoder(accept)
            more = await asyncio.to_thread(encode, registry)
            body = body.removesuffix(b"# EOF\n") + more
        return body, content_type


class LoadCollector(Scraped):
    """The load table's cells as metric families. Arguments: see :class:`Metrics`."""

    def __init__(
        self,
        table: LoadTable,
        publisher: Publisher,
        peers: Callable[[], Mapping[str, float]],
    ) -> None:
        self._table = table
        self._publisher = publisher
        self._peers = peers

    @override
    def collect(self) -> Iterable[Metric]:
        snapshot = self._publisher.snapshot()
        yield from self._models(snapshot.routes)
        yield from self._endpoints(snapshot.routes)
        yield self._iterations()
        yield from self._routing_versions(snapshot.version)
        yield self._silences()
        yield InfoMetricFamily("kubeai_build", "KubeAI version.", {"version": kubeai.__version__})

    def _models(self, routes: tuple[Route, ...]) -> Iterable[Metric]:
        active = GaugeMetricFamily(
            f"{REQUESTS}_active",
            "Number of requests being served or held, by model.",
            labels=("request_model", "request_type"),
        )
        held = GaugeMetricFamily(
            f"{REQUESTS}_held",
            "Number of requests held until an endpoint is available, by model.",
            labels=("request_model",),
        )
        for route in routes:
            for kind in _REQUEST_TYPES:
                active.add_metric((route.model, kind), self._table.active(route.row, kind))
            held.add_metric((route.model,), self._table.held(route.row))
        return active, held, *self._outcomes(routes), *self._picks(routes)

    def _picks(self, routes: tuple[Route, ...]) -> Iterable[Metric]:
        prompts = CounterMetricFamily(
            "kubeai_prompt_tokens",
            "Total number of prompt tokens of requests that were routed by prefix, as estimated.",
            labels=("request_model",),
        )
        cached = CounterMetricFamily(
            "kubeai_prompt_tokens_expected_cached",
            "Total number of these tokens that the picked endpoint was believed to have cached.",
            labels=("request_model",),
        )
        reasons = CounterMetricFamily(
            "kubeai_picks",
            "Total number of picks by prefix: cached, away from a cached prefix, or new.",
            labels=("request_model", "reason"),
        )
        slowness = GaugeMetricFamily(
            "kubeai_endpoint_slowness",
            "Learned time per prompt token of an endpoint, relative to its model's endpoints.",
            labels=("request_model", "endpoint"),
        )
        reported = [
            CounterMetricFamily(
                f"kubeai_reported_{name}",
                f"Total number of {what} tokens that engines have reported in responses.",
                labels=("request_model",),
            )
            for name, what in (
                ("prompt_tokens", "prompt"),
                ("prompt_tokens_cached", "cached prompt"),
                ("output_tokens", "output"),
            )
        ]
        for route in routes:
            counts = picks(self._table, route.row)
            for family, key in zip(reported, ("prompt", "cached", "output"), strict=True):
                family.add_metric((route.model,), counts[f"reported_{key}_tokens"])
            if route.strategy == "LeastLoad" and not counts["prompt_tokens"]:
                continue
            prompts.add_metric((route.model,), counts["prompt_tokens"])
            cached.add_metric((route.model,), counts["cached_tokens"])
            for reason in ("cached", "away", "new"):
                reasons.add_metric((route.model, reason), counts[reason])
            for endpoint in route.endpoints:
                if learned := self._table.slowness(endpoint.row):
                    slowness.add_metric((route.model, endpoint.name), learned)
        return prompts, cached, reasons, slowness, *reported

    def _outcomes(self, routes: tuple[Route, ...]) -> Iterable[Metric]:
        ended = CounterMetricFamily(
            REQUESTS,
            "Total number of finished requests, by model and outcome.",
            labels=("request_model", "outcome"),
        )
        retried = CounterMetricFamily(
            f"{REQUESTS}_retries",
            "Total number of retried attempts, by model.",
            labels=("request_model",),
        )
        for route in routes:
            for outcome, count in self._table.outcomes(route.row).items():
                if outcome == "retried":
                    retried.add_metric((route.model,), count)
                else:
                    ended.add_metric((route.model, outcome), count)
        return ended, retried

    def _endpoints(self, routes: tuple[Route, ...]) -> Iterable[Metric]:
        in_flight = GaugeMetricFamily(
            "kubeai_endpoint_requests_in_flight",
            "Number of this KubeAI replica's in-flight requests, by endpoint.",
            labels=("request_model", "endpoint"),
        )
        peers = GaugeMetricFamily(
            "kubeai_endpoint_peers_requests_in_flight",
            "Number of the peers' in-flight requests, as last reported, by endpoint.",
            labels=("request_model", "endpoint"),
        )
        pending = GaugeMetricFamily(
            "kubeai_endpoint_pending_tokens",
            "Prompt tokens of all KubeAI replicas that await a first byte, by endpoint.",
            labels=("request_model", "endpoint"),
        )
        choices = [
            CounterMetricFamily(
                f"{REQUESTS}_hash_lookup_{choice}",
                f"Total number of hash lookups {what}",
                labels=("endpoint",),
            )
            for choice, what in (
                ("initial", "for which this endpoint was the first candidate."),
                ("final", "that selected this endpoint."),
                ("default", "that selected this endpoint because all exceeded the load bound."),
            )
        ]
        ejected = GaugeMetricFamily(
            "kubeai_endpoint_ejected",
            "1 if the endpoint is ejected or half-open, 0 otherwise.",
            labels=("request_model", "endpoint"),
        )
        for route in routes:
            hashed = route.strategy == "PrefixHash"
            for endpoint in route.endpoints:
                here = self._table.in_flight_here(endpoint.row)
                in_flight.add_metric((route.model, endpoint.name), here)
                peers.add_metric(
                    (route.model, endpoint.name), self._table.in_flight(endpoint.row) - here
                )
                pending.add_metric((route.model, endpoint.name), self._table.pending(endpoint.row))
                ejected.add_metric(
                    (route.model, endpoint.name), float(self._table.ejected_until(endpoint.row) > 0)
                )
                counts = self._table.lookups(endpoint.row)
                if hashed or any(counts):
                    for family, count in zip(choices, counts, strict=True):
                        family.add_metric((endpoint.name,), count)
        return in_flight, peers, pending, ejected, *choices

    def _iterations(self) -> Metric:
        counts, total = self._table.iterations()
        bounds = [*(str(float(bound)) for bound in ITERATION_BUCKETS), "+Inf"]
        cumulative, buckets = 0, []
        for bound, count in zip(bounds, counts, strict=True):
            cumulative += count
            buckets.append((bound, float(cumulative)))
        return HistogramMetricFamily(
            f"{REQUESTS}_hash_lookup_iterations",
            "Number of distinct endpoints considered by a hash lookup.",
            buckets=buckets,
            sum_value=total,
        )

    def _routing_versions(self, version: int) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "kubeai_routing_table_version", "Published version of the routing table.", version
        )
        applied = GaugeMetricFamily(
            "kubeai_worker_routing_table_version",
            "Version of the routing table that the worker has applied.",
            labels=("worker",),
        )
        for column in range(self._table.columns - 1):
            applied.add_metric((str(column),), self._table.acknowledged(column))
        yield applied

    def _silences(self) -> Metric:
        silences = GaugeMetricFamily(
            "kubeai_peer_silence_seconds",
            "Seconds since a peer last reported its loads.",
            labels=("peer",),
        )
        for address, silence_s in self._peers().items():
            silences.add_metric((address,), silence_s)
        return silences
