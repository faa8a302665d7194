"""The routes of Models, as the operator's store has them.

A route also depends on what was observed before: since when a Model has been blocked, and how long
its replicas take to start. :class:`RoutePublisher` keeps that, and the names that Models share. The
Operator calls it from watch callbacks.
"""

from __future__ import annotations

from collections.abc import Callable

from kubeai.api.config.system import SystemConfig
from kubeai.operator.blocks import BlockTracker
from kubeai.operator.names import Names
from kubeai.operator.routes import route_of
from kubeai.operator.starting import StartTracker
from kubeai.operator.store import Store
from kubeai.podspec import form_model
from kubeai.routing.routes import Route


class RoutePublisher:
    """Calls ``publish(model, route)``, with None for a Model that does not exist."""

    def __init__(
        self, store: Store, config: SystemConfig, publish: Callable[[str, Route | None], None]
    ) -> None:
        self.names = Names()
        self._store = store
        self._config = config
        self._publish = publish
        self._blocks = BlockTracker(config.gateway)
        self._starts = StartTracker()

    def publish(self, name: str) -> None:
        """Publish the Model's current route."""
        model = self._store.models.get(name)
        if model is None:
            self._blocks.forget(name)
            self._starts.forget(name)
            self._publish(name, None)
            return
        pods = self._store.observed_pods(name)
        route = route_of(
            model,
            pods,
            self._blocks.observe(model, pods),
            self._starts.observe(model, pods),
            form_model(model, self._config),
            gateway=self._config.gateway,
            names=self.names.resolve(name),
        )
        self._publish(name, route)
