"""What the requests of one worker process share.

:class:`Context` has the routing table, the config, the observers, the callback that demands a
replica of a model, and the counts of held requests and spooled bytes. The worker creates one;
server.py, proxy.py, local_routes.py and uploads use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

from kubeai._rate_limit import RateLimit
from kubeai.gateway._fast_path_context import FastPathContext, JsonRoute
from kubeai.gateway._metering import Meter
from kubeai.gateway.background_responses import BackgroundResponses
from kubeai.gateway.cors import CorsPolicy
from kubeai.gateway.event_counts import EventCounter
from kubeai.gateway.keys import Keys
from kubeai.gateway.retries import Retries, RetryBudget
from kubeai.gateway.stored_responses import StoredResponses
from kubeai.openai.request import SHAPES
from kubeai.openai.routes import route_table

if TYPE_CHECKING:
    from kubeai.api.config.system import GatewayConfig
    from kubeai.gateway.access_log import Observers
    from kubeai.gateway.endpoint_pool import ConsolePool, LocalRoutesPool
    from kubeai.routing.routes import RequestType
    from kubeai.routing.table import RoutedModel, RoutingTable

# The request targets that the fast path serves. Ollama's API is not among them, because only some
# engines have it.
JSON_ROUTES = {
    path.encode(): JsonRoute(kind, kind.value.encode(), SHAPES[kind])
    for path, kind in route_table.items()
    if kind.is_json and not kind.is_ollama
}

# Under load many requests move, and a line takes 10 µs: half as much as a request.
MOVES_BURST_MAX_LINES = 500
MOVES_LINES_PER_S = 20


class HoldWatcher(Protocol):
    """Follows the holds of requests, by request ID; see :attr:`Context.hold_watcher`."""

    def on_hold(self, request_id: str) -> None:
        """The request has no endpoint, and is about to be held or rejected."""

    async def on_endpoint(self, request_id: str) -> None:
        """An endpoint can serve the request. Returns when the request may be sent there.

        At once if the request is not held. If no endpoint is left by then, :meth:`on_hold` may be
        called again.
        """


class Context(FastPathContext):
    """See the module. The Server sets ``routes``, ``models`` and ``local_routes``."""

    routes: RoutingTable
    local_routes: LocalRoutesPool  # serves what is not proxied
    console: ConsolePool | None = None  # None: not served
    hold_watcher: HoldWatcher | None = None  # set by a process that sends the requests itself

    def __init__(
        self,
        config: GatewayConfig,
        demand: Callable[[str], None],
        observers: Observers | None = None,
        *,
        request_type: RequestType = "http",
    ) -> None:
        """``demand``: notifies the supervisor that a request is held for a model."""
        self.request_type = request_type
        self.config = config
        self.body_max_bytes = config.body_max_bytes
        self.demand = demand
        self.observers = observers
        self.explains = config.explain
        self.logs_prompts = config.access_log_prompts and observers is not None
        self.moves = RateLimit(MOVES_BURST_MAX_LINES, MOVES_LINES_PER_S)
        self.json_routes = JSON_ROUTES
        self.cors = CorsPolicy(config.cors_origins) if config.cors_origins else None
        self.journal = None  # set by the worker
        self.events = EventCounter()  # sent by the worker
        # The messenger's requests come from a broker that has its own credentials.
        needs_keys = config.keys.required and request_type == "http"
        self.keys = {} if needs_keys else None
        self.key_table = (
            None
            if self.keys is None
            else Keys(self.keys, config.keys.failures_per_minute, self.events)
        )
        self.limits = None  # set by the worker
        self.meter = Meter() if needs_keys else None
        self.usage_refusals = None
        self.ready = False  # the first routing table has arrived
        self.draining = False
        self._held: dict[str, int] = {}
        self._budgets: WeakKeyDictionary[RoutedModel, RetryBudget] = WeakKeyDictionary()
        self.stored_responses = StoredResponses()
        self.background_responses = BackgroundResponses(self.meter)
        self.spooled_bytes = 0  # of multipart forms that are being received or sent

    def hold(
        self,
        model: str,
        *,
        displaces: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Count a request as held for a model; False if the limit is reached.

        The limit is ``hold_max_requests`` per model and worker. ``displaces`` ends the wait of
        another request, if that is possible. The displaced request is counted until its task ends,
        so the count may exceed the limit by one. After True, call :meth:`unhold` exactly once.
        """
        held = self._held.get(model, 0)
        if held >= self.config.hold_max_requests and not displaces():
            return False
        self._held[model] = held + 1
        return True

    def unhold(self, model: str) -> None:
        """Stop counting a request as held."""
        held = self._held[model] - 1
        if held:
            self._held[model] = held
        else:
            del self._held[model]

    def held(self, model: str) -> int:
        """The number of requests that this worker holds for a model."""
        return self._held.get(model, 0)

    def retries(self, routed: RoutedModel) -> Retries:
        """The retries of one request, within the model's budget."""
        config = self.config
        budget = self._budgets.get(routed)
        if budget is None:
            min_count = config.retry_budget_min / self.routes.workers
            budget = RetryBudget(config.retry_budget_percent, min_count)
            self._budgets[routed] = budget

        def take(likely: bool) -> bool:
            return budget.take(routed.answered(), time.monotonic(), likely=likely)

        return Retries(config.retries, take, timeouts=config.retry_first_byte_timeout)

    def has_spool_room(self, size_bytes: int) -> bool:
        """Whether a form of this size keeps all forms together within ``spool_max_bytes``."""
        return self.spooled_bytes + size_bytes <= self.config.spool_max_bytes

    def spool(self, size_bytes: int) -> bool:
        """Reserve spool space for a part of a form, if there is room.

        After True, release the space with :meth:`unspool`.
        """
        if not self.has_spool_room(size_bytes):
            return False
        self.spooled_bytes += size_bytes
        return True

    def unspool(self, size_bytes: int) -> None:
        """Release spool space."""
        self.spooled_bytes -= size_bytes
