"""Prometheus metrics, read off the load table when somebody scrapes.

Nothing is counted here: workers count in their cells of the load table, in the hot path; this
names the cells, by the Publisher's rows. So one scrape of the supervisor is the whole replica of
KubeAI, and a series exists exactly as long as its model or endpoint does: a name that a client
invents makes none.

The supervisor owns one :class:`Metrics` and serves what it renders at ``metricsAddr``.
"""

from __future__ import annotations

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

import kubeai
from kubeai._load import ITERATION_BUCKETS, LoadTable
from kubeai.routing import Publisher, RequestType, Route

REQUESTS = "kubeai_inference_requests"
_REQUEST_TYPES: tuple[RequestType, ...] = ("http", "message")


class Metrics:
    """All metrics of this replica of KubeAI. ``peers``: the silence of each other one, in s."""

    def __init__(
        self,
        table: LoadTable,
        publisher: Publisher,
        peers: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(LoadCollector(table, publisher, peers))
        ProcessCollector(registry=self._registry)  # of the supervisor

    def render(self, accept: str) -> tuple[bytes, str]:
        """(body, content type): Prometheus text or OpenMetrics, as the Accept header asks."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


class LoadCollector(Collector):
    """The load table's cells as metric families."""

    def __init__(
        self,
        table: LoadTable,
        publisher: Publisher,
        peers: Callable[[], Mapping[str, float]],
    ) -> None:
        self._table = table
        self._publisher = publisher
        self._peers = peers

    def describe(self) -> Iterable[Metric]:
        return ()  # spares the registry a collection while it registers

    def collect(self) -> Iterable[Metric]:
        snapshot = self._publisher.snapshot()
        yield from self._models(snapshot.routes)
        yield from self._endpoints(snapshot.routes)
        yield self._iterations()
        yield from self._hinge(snapshot.version)
        yield self._silences()
        yield InfoMetricFamily("kubeai_build", "This program.", {"version": kubeai.__version__})

    def _models(self, routes: tuple[Route, ...]) -> Iterable[Metric]:
        active = GaugeMetricFamily(
            f"{REQUESTS}_active",
            "Requests that are being served or held, by model.",
            labels=("request_model", "request_type"),
        )
        held = GaugeMetricFamily(
            f"{REQUESTS}_held",
            "Requests that wait for an endpoint, by model.",
            labels=("request_model",),
        )
        for route in routes:
            for kind in _REQUEST_TYPES:
                active.add_metric((route.model, kind), self._table.active(route.row, kind))
            held.add_metric((route.model,), self._table.held(route.row))
        return active, held, *self._outcomes(routes)

    def _outcomes(self, routes: tuple[Route, ...]) -> Iterable[Metric]:
        ended = CounterMetricFamily(
            REQUESTS,
            "Requests that are over, by model and by how they ended.",
            labels=("request_model", "outcome"),
        )
        retried = CounterMetricFamily(
            f"{REQUESTS}_retries", "Further attempts, by model.", labels=("request_model",)
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
            "Requests sent to an endpoint by this replica and not yet ended.",
            labels=("request_model", "endpoint"),
        )
        peers = GaugeMetricFamily(
            "kubeai_endpoint_peers_requests_in_flight",
            "Requests that the other replicas have at an endpoint, as they last told this one.",
            labels=("request_model", "endpoint"),
        )
        choices = [
            CounterMetricFamily(
                f"{REQUESTS}_hash_lookup_{choice}", f"Hash lookups {what}", labels=("endpoint",)
            )
            for choice, what in (
                ("initial", "that looked at this endpoint first."),
                ("final", "that took this endpoint."),
                ("default", "that took this endpoint because none was within the load bound."),
            )
        ]
        ejected = GaugeMetricFamily(
            "kubeai_endpoint_ejected",
            "1 for an endpoint that is ejected or half-open.",
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
                ejected.add_metric(
                    (route.model, endpoint.name), float(self._table.ejected_until(endpoint.row) > 0)
                )
                counts = self._table.lookups(endpoint.row)
                if hashed or any(counts):
                    for family, count in zip(choices, counts, strict=True):
                        family.add_metric((endpoint.name,), count)
        return in_flight, peers, ejected, *choices

    def _iterations(self) -> Metric:
        counts, total = self._table.iterations()
        bounds = [*(str(float(bound)) for bound in ITERATION_BUCKETS), "+Inf"]
        cumulative, buckets = 0, []
        for bound, count in zip(bounds, counts, strict=True):
            cumulative += count
            buckets.append((bound, float(cumulative)))
        return HistogramMetricFamily(
            f"{REQUESTS}_hash_lookup_iterations",
            "Distinct endpoints that a hash lookup looked at.",
            buckets=buckets,
            sum_value=total,
        )

    def _hinge(self, version: int) -> Iterable[Metric]:
        yield GaugeMetricFamily(
            "kubeai_routing_table_version", "Version of the routing table, as published.", version
        )
        applied = GaugeMetricFamily(
            "kubeai_worker_routing_table_version",
            "Version of the routing table that a worker has applied.",
            labels=("worker",),
        )
        for column in range(self._table.columns - 1):
            applied.add_metric((str(column),), self._table.acknowledged(column))
        yield applied

    def _silences(self) -> Metric:
        silences = GaugeMetricFamily(
            "kubeai_peer_silence_seconds",
            "How long ago another replica of KubeAI told its loads.",
            labels=("peer",),
        )
        for address, silence_s in self._peers().items():
            silences.add_metric((address,), silence_s)
        return silences
