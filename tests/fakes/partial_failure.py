"""Endpoints that fail and recover under load, in virtual time.

The ring, the load table, the routing table and the policy (Health, Retries, RetryBudget) are those
that serve requests; engines, connections and time are not real. Two workers share the endpoints, as
two processes of a gateway do. Used by tests and by ``bench/partial_failure.py``.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kubeai._counts import Reservation
from kubeai._load import LoadTable
from kubeai._prompt import Prompt
from kubeai.api.config.system import GatewayConfig
from kubeai.gateway.health import Health
from kubeai.gateway.retries import NO_ANSWER, Retries, RetryBudget
from kubeai.openai.errors import ErrorResponse
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route
from kubeai.routing.table import RoutedModel, RoutingTable

WORKERS = 2
ANSWER_S = 0.05  # to the first byte of a good answer
SLOW_S = 2.0  # the same of a slow endpoint
FAIL_S = 0.001  # to a reset or an error status
FAILING = ("reset", "503", "500", "hang", "slow")


class Upstream:
    """What a worker knows of an endpoint: see ``ConnectionPool``, whose rules these are."""

    def __init__(self, cluster: Cluster, routed: RoutedModel, endpoint: Endpoint) -> None:
        self._clock = cluster.clock
        self._health = Health(routed, endpoint.name, cluster.config, cluster.clock)
        self._failing = self.probing = False
        self._answers = 0
        self._answered_s = 0.0
        self.movable: dict[Callable[[], None], float] = {}  # since when it waits

    def close(self) -> None:
        pass

    def picked(self, reservation: Reservation) -> None:
        self.probing = self.probing or reservation.is_probe
        self._failing = self._failing or reservation.failing

    def failed(self, *, unreachable: bool) -> None:
        self._failing = True
        probe, self.probing = self.probing, False
        self._health.failed(unreachable=unreachable, probe=probe)

    def answered(self) -> None:
        self._answers += 1
        self._answered_s = self._clock()
        if self.probing:
            self._health.restored()
        if self._failing or self.probing:
            self._failing = self.probing = False
            self._health.restored()
            self._health.recovered()

    @property
    def is_waited_on(self) -> bool:
        return bool(self.movable)

    def move_waiting(self, sent_before_s: float = math.inf) -> None:
        for move, since_s in list(self.movable.items()):
            if since_s < sent_before_s:
                move()

    @property
    def is_trusted(self) -> bool:
        return self._health.is_trusted(self._answers)

    @property
    def is_down(self) -> bool:
        return self._health.is_down(self._answered_s)

    def take_probe(self) -> bool:
        return self._health.take_probe(self._answered_s)

    def is_proven(self, since_s: float) -> bool:
        return self._health.is_proven(self._answered_s, since_s)


@dataclass
class Report:
    """The outcome of a number of requests."""

    answered: int = 0
    failed: int = 0
    attempts: Counter[str] = field(default_factory=Counter)  # by endpoint
    most_attempts: int = 0  # of one request
    longest_s: float = 0.0  # of one request

    def add(self, answered: bool, attempts: list[str], took_s: float) -> None:
        self.answered += answered
        self.failed += not answered
        self.attempts.update(attempts)
        self.most_attempts = max(self.most_attempts, len(attempts))
        self.longest_s = max(self.longest_s, took_s)


class Cluster:
    """Endpoints ``e0`` … and two workers; to be made within the event loop that it runs in."""

    def __init__(self, endpoints: int, *, seed: int = 1, **config: Any) -> None:
        self.clock = asyncio.get_running_loop().time
        self.config = GatewayConfig(**config)
        self._random = random.Random(seed)
        self.names = [f"e{number}" for number in range(endpoints)]
        self.behaviours: dict[str, str] = dict.fromkeys(self.names, "good")
        self._table = LoadTable.create(64, WORKERS)
        self._loads = [LoadTable.attach(self._table.fd, column) for column in range(WORKERS)]
        self._routing = [RoutingTable(loads, self._upstream, self.clock) for loads in self._loads]
        self._budgets = [
            RetryBudget(self.config.retry_budget_percent, self.config.retry_budget_min / WORKERS)
            for _ in self._loads
        ]
        self._publisher = Publisher(self._table)
        self._changed = asyncio.Event()
        self.route(self.names)
        self._watching = asyncio.create_task(self._watch())

    def _upstream(self, routed: RoutedModel, endpoint: Endpoint) -> Upstream:
        return Upstream(self, routed, endpoint)

    def route(self, names: list[str]) -> None:
        """Publish a route with these endpoints."""
        endpoints = tuple(Endpoint(name, f"10.0.0.1:{8000 + int(name[1:])}") for name in names)
        delta = self._publisher.update("m", Route("m", "VLLM", endpoints=endpoints))
        if delta is not None:
            for routing in self._routing:
                routing.apply(delta)

    def behave(self, behaviours: Mapping[str, str]) -> None:
        """From now on: "good", or one of FAILING; endpoints that are not named are good."""
        self.behaviours = {name: behaviours.get(name, "good") for name in self.names}
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        self._watching.cancel()
        for routing in self._routing:
            routing.close()
        for table in (*self._loads, self._table):
            table.close()

    # -- load ----------------------------------------------------------------------------------

    async def at_once(self, count: int) -> Report:
        report = Report()
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(self._request(report))
        return report

    async def one_by_one(self, count: int) -> Report:
        report = Report()
        for _ in range(count):
            await self._request(report)
        return report

    async def steadily(self, per_s: float, for_s: float) -> Report:
        report = Report()
        async with asyncio.TaskGroup() as group:
            for _ in range(int(per_s * for_s)):
                group.create_task(self._request(report))
                await asyncio.sleep(1 / per_s)
        return report

    # -- one request: as gateway/proxy.py ---------------------------------------------------------

    async def _request(self, report: Report) -> None:
        worker = self._random.randrange(WORKERS)
        routed = self._routing[worker].find("m")
        retries = Retries(
            self.config.retries,
            lambda likely: self._budgets[worker].take(
                routed.answered(), self.clock(), likely=likely
            ),
            clock=self.clock,
            random=self._random.random,
        )
        began_s = self.clock()
        attempts: list[str] = []
        admission = routed.admit()
        try:
            reservation = routed.pick(Prompt())
            while True:
                attempts.append(reservation.name)
                status, moved_to = await self._attempt(routed, retries, reservation)
                if moved_to is None and not (
                    status != 200 and retries.wants(status, reservation.name, routed)
                ):
                    break
                reservation = (
                    moved_to
                    or retries.elsewhere(routed, Prompt(), None)
                    or await retries.later(routed, Prompt(), None)
                )
        except ErrorResponse:
            status = 503
        admission.count("2xx" if status == 200 else "5xx")
        admission.close()
        report.add(status == 200, attempts, self.clock() - began_s)

    async def _attempt(
        self, routed: RoutedModel, retries: Retries, reservation: Reservation
    ) -> tuple[int, Reservation | None]:
        """(Status or NO_ANSWER, where the request has moved to)."""
        upstream: Upstream = reservation.target
        upstream.picked(reservation)
        moved_to: Reservation | None = None
        serving = asyncio.ensure_future(self._serve(reservation.name))

        def move() -> None:
            nonlocal moved_to
            moved_to = retries.move(reservation, routed, Prompt(), None)
            if moved_to is not None:
                serving.cancel()

        upstream.movable[move] = self.clock()
        try:
            status = await serving
        except asyncio.CancelledError:
            return NO_ANSWER, moved_to
        finally:
            del upstream.movable[move]
            reservation.release()
        if status == 200:
            upstream.answered()
        else:
            upstream.failed(unreachable=status == NO_ANSWER)
        return status, None

    async def _serve(self, name: str) -> int:
        """What the engine does with a request that it has been sent."""
        behaviour = self.behaviours[name]
        while behaviour == "hang":
            await self._changed.wait()
            behaviour = self.behaviours[name]
        good = behaviour in ("good", "slow")
        typical_s = {"good": ANSWER_S, "slow": SLOW_S}.get(behaviour, FAIL_S)
        await asyncio.sleep(typical_s * (0.5 + self._random.random()))
        if good:
            return 200
        return NO_ANSWER if behaviour == "reset" else int(behaviour)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            for routing in self._routing:
                routing.move_off_ejected()
