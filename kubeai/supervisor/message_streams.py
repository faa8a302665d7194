"""The state of the message streams, as the messenger reports it.

:class:`MessageStreams` keeps the counts across restarts of the messenger, for ``/metrics``.
What a messenger counted after its last report is lost when it is killed: up to
``REPORT_INTERVAL_S``. Owned by the supervisor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from typing_extensions import override

from kubeai.api.config.system import Messaging
from kubeai.brokers.urls import public_url
from kubeai.routing.channel import OUTCOMES, Side, StreamReport, Streams
from kubeai.supervisor.scraped import Scraped

_SIDES = ("requests", "responses")
_COUNTERS = {
    "received": "Total number of deliveries of messages from the broker.",
    "redelivered": "Total number of these deliveries whose message had been delivered before.",
    "retried": "Total number of failed attempts that were repeated.",
    "dead": "Total number of messages that were given up: answered with the last error.",
    "publish_failures": "Total number of failures to publish a response, which were repeated.",
}


class MessageStreams(Scraped):
    """See the module."""

    def __init__(self, messaging: Messaging) -> None:
        self._urls = [public_url(stream.requests_url) for stream in messaging.streams]
        self._before = [Counter[str]() for _ in self._urls]  # counted by earlier messengers
        self._reports = [StreamReport() for _ in self._urls]

    def report(self, streams: Streams) -> None:
        """Take in a report of the messenger."""
        self._reports = list(streams.reports)

    def ended(self) -> None:
        """The messenger's process has ended."""
        for before, report in zip(self._before, self._reports, strict=True):
            before.update(_counts(report))
        self._reports = [StreamReport() for _ in self._urls]

    @property
    def problems(self) -> list[str]:
        """What is not connected, and why; empty if everything is."""
        return [
            f"{url}: {name}: {side.problem or 'not connected'}"
            for url, report in zip(self._urls, self._reports, strict=True)
            for name, side in zip(_SIDES, (report.requests, report.responses), strict=True)
            if not side.connected
        ]

    @override
    def collect(self) -> Iterable[Metric]:
        counters = {
            name: _counter(f"kubeai_messages_{name}", what) for name, what in _COUNTERS.items()
        }
        answered = _counter(
            "kubeai_messages_answered",
            "Total number of messages whose response the broker has confirmed, by outcome.",
            "outcome",
        )
        gauges = {
            "in_hand": _gauge(
                "kubeai_messages_in_hand", "Number of messages received and not yet answered."
            ),
            "held": _gauge(
                "kubeai_messages_held",
                "Number of messages in hand that wait for an endpoint of their model.",
            ),
        }
        lag = _gauge("kubeai_messages_lag", "Number of messages that wait in the broker.")
        connected = _gauge(
            "kubeai_message_stream_connected", "1 if connected to the broker, 0 otherwise.", "side"
        )
        connections = _counter(
            "kubeai_message_stream_connections",
            "Total number of connections made to the broker.",
            "side",
        )
        for i, (url, report) in enumerate(zip(self._urls, self._reports, strict=True)):
            labels = (str(i), url)
            total = self._before[i] + Counter(_counts(report))
            for name, counter in counters.items():
                counter.add_metric(labels, total[name])
            for outcome in OUTCOMES:
                answered.add_metric((*labels, outcome), total[outcome])
            gauges["in_hand"].add_metric(labels, report.in_hand)
            gauges["held"].add_metric(labels, report.held)
            if report.lag is not None:
                lag.add_metric(labels, report.lag)
            for side, state in zip(_SIDES, (report.requests, report.responses), strict=True):
                connected.add_metric((*labels, side), float(state.connected))
                connections.add_metric((*labels, side), total[side])
        return *counters.values(), answered, *gauges.values(), lag, connected, connections


def _counts(report: StreamReport) -> dict[str, int]:
    sides: tuple[Side, ...] = (report.requests, report.responses)
    return {
        **{name: getattr(report, name) for name in _COUNTERS},
        **report.answered,
        **{name: side.connections for name, side in zip(_SIDES, sides, strict=True)},
    }


def _counter(name: str, what: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(name, what, labels=("stream", "requests_url", *labels))


def _gauge(name: str, what: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, what, labels=("stream", "requests_url", *labels))
