"""The loads that the operator scales and drains by."""

from __future__ import annotations

from kubeai._load import LoadTable
from kubeai.routing.publisher import Publisher
from kubeai.supervisor.peers.peers import Peers


class AllLoads:
    """Loads by model and endpoint name, of this KubeAI replica and its peers, for the operator."""

    def __init__(self, table: LoadTable, publisher: Publisher, peers: Peers) -> None:
        self._table = table
        self._publisher = publisher
        self._peers = peers

    def active(self, model: str) -> int:
        """Requests of a model that are open, held ones included."""
        row = self._publisher.row(model)
        return self._peers.active(model) + (0 if row is None else self._table.active(row))

    def held(self, model: str) -> int:
        """Requests of a model that this KubeAI replica holds."""
        row = self._publisher.row(model)
        return 0 if row is None else self._table.held(row)

    def in_flight(self, model: str, endpoint: str) -> int:
        """Requests that an endpoint is serving."""
        row = self._publisher.endpoint_rows(model).get(endpoint)
        return 0 if row is None else self._table.in_flight(row)

    def in_use(self, model: str, endpoint: str) -> bool:
        """Whether any KubeAI replica may still send an endpoint requests, or has some in flight."""
        return (
            self._publisher.in_use(model, endpoint)
            or self._peers.routes(endpoint)
            or not self._peers.complete()
        )

    def ended(self, model: str) -> int:
        """Requests of a model that have ended, with any outcome; never decreases."""
        row = self._publisher.row(model)
        return self._peers.ended(model) + (0 if row is None else self._table.ended(row))

    def complete(self) -> bool:
        """Whether the loads of all peers are known."""
        return self._peers.complete()
