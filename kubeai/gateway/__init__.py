"""The data plane: what one worker process does with the requests that reach it.

:class:`Gateway` is what the rooms of a worker share: the routing table, the limits, the way to say
that a cold model is wanted, and how much is open. The worker makes one; connection.py and
exchange.py (the relay's side) and pages.py (the aiohttp application) read it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from kubeai.gateway.attempts import RetryBudget

if TYPE_CHECKING:
    from kubeai._relay import Relay
    from kubeai.api.config import GatewayConfig
    from kubeai.routing import RoutedModel, RoutingTable


class Gateway:
    """What the parts of one worker share."""

    def __init__(
        self, table: RoutingTable, config: GatewayConfig, demand: Callable[[str], None]
    ) -> None:
        """``demand``: sends word up the hinge that a request waits for a model."""
        self.table = table
        self.config = config
        self.demand = demand
        self.ready = False  # a routing table has arrived
        self.draining = False
        self.relay: Relay | None = None
        self._held: dict[str, int] = {}
        self._budgets: WeakKeyDictionary[RoutedModel, RetryBudget] = WeakKeyDictionary()
        self.spooled_bytes = 0  # of forms that are being read or sent

    @property
    def connections(self) -> int:
        """Downstream connections that are open."""
        return 0 if self.relay is None else self.relay.connections

    @property
    def exchanges(self) -> int:
        """Requests between their head and the end of their answer."""
        return 0 if self.relay is None else self.relay.exchanges

    def hold(self, model: str) -> bool:
        """Take a place among the requests held for a model; False when all places are taken.

        The limit is ``hold_max_requests`` a model and worker. Each True is given back with
        :meth:`unhold`.
        """
        held = self._held.get(model, 0)
        if held >= self.config.hold_max_requests:
            return False
        self._held[model] = held + 1
        return True

    def unhold(self, model: str) -> None:
        """Give a place back."""
        held = self._held[model] - 1
        if held:
            self._held[model] = held
        else:
            del self._held[model]

    def held(self, model: str) -> int:
        """Requests that this worker holds for a model."""
        return self._held.get(model, 0)

    def may_retry(self, routed: RoutedModel, likely: bool) -> bool:
        """Whether one more retry is within a model's budget: see `RetryBudget.take`."""
        budget = self._budgets.get(routed)
        if budget is None:
            config = self.config
            min_count = config.retry_budget_min / self.table.workers
            budget = RetryBudget(config.retry_budget_percent, min_count)
            self._budgets[routed] = budget
        return budget.take(routed.answered(), time.monotonic(), likely=likely)

    def spool(self, size_bytes: int) -> bool:
        """Take room for more of a form; False when all forms together have ``spool_max_bytes``.

        What each True has taken is given back with :meth:`unspool`.
        """
        if self.spooled_bytes + size_bytes > self.config.spool_max_bytes:
            return False
        self.spooled_bytes += size_bytes
        return True

    def unspool(self, size_bytes: int) -> None:
        """Give room back."""
        self.spooled_bytes -= size_bytes
