"""A worker's side of the routing table.

:class:`RoutingTable` applies the supervisor's changes in order and picks endpoints for requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from msgspec.structs import replace

from kubeai._counts import Admission, Reservation, admit
from kubeai._load import LoadTable
from kubeai._pick import Picker, RoutedFields
from kubeai._prefix import PrefixIndex
from kubeai._prompt import Prompt
from kubeai._queue_table import QueueTable
from kubeai._ring import Ring
from kubeai.routing.changes import Changes
from kubeai.routing.queueing import ModelQueue
from kubeai.routing.routes import Block, Delta, Endpoint, RequestType, Route, Snapshot

# After panic mode, an endpoint is not probed until this long after its last failure.
PROBE_AFTER_FAILURE_S = 1.0


class EndpointConnections(Protocol):
    """A worker's connections to an endpoint's address, and its health."""

    def close(self) -> None:
        """The endpoint was removed or its address changed; in-flight requests may finish."""

    @property
    def is_waited_on(self) -> bool:
        """Whether requests wait for the first byte of its response."""

    def move_waiting(self, sent_before_s: float = math.inf) -> None:
        """Move requests that wait for its response to other endpoints, where possible.

        Only those sent before ``sent_before_s`` (CLOCK_MONOTONIC seconds).
        """

    @property
    def is_trusted(self) -> bool:
        """Whether it is expected to respond."""

    @property
    def is_down(self) -> bool:
        """Whether it currently fails repeatedly."""

    def take_probe(self) -> bool:
        """Whether a request may probe it now; the probe is then counted."""

    def is_proven(self, since_s: float) -> bool:
        """Whether it began a successful response after ``since_s`` and has not failed since."""


class RoutingTable:
    """A worker's view of all models. Only the supervisor's messages change it, on one event loop.

    ``make_connections`` creates the EndpointConnections that an endpoint's Reservations carry,
    once per address and row. They are closed when the endpoint is removed or either changes.
    """

    def __init__(
        self,
        table: LoadTable,
        make_connections: Callable[[RoutedModel, Endpoint], EndpointConnections],
        clock: Callable[[], float] | None = None,
        index: PrefixIndex | None = None,
        queues: QueueTable | None = None,
    ) -> None:
        """``table``: this worker's column of the load table.

        ``clock``: seconds on the time scale of ejections; None: CLOCK_MONOTONIC. ``index``: which
        prompts the endpoints have cached; None: unknown. ``queues``: the queue
        table that the workers share; None: this worker is the only one, with its own.
        """
        self.version = 0
        self.queues = queues or _own_queues(table)
        self._table = table
        self._make_connections = make_connections
        self._clock = clock
        self._index = index
        # The same objects for as long as the table lives, as the fast path uses them.
        self.models: dict[str, RoutedModel] = {}  # by name
        self.aliases: dict[str, str] = {}  # the names of the Models that they belong to
        self.canaried: set[str] = set()  # the names of the Models with a canary
        self._health_events = 0  # of the load table, at the last check for ejected endpoints
        self._any_ejected = False  # at that check

    def apply(self, message: Snapshot | Delta) -> None:
        """Apply a change and acknowledge its version. Outdated changes are ignored."""
        if isinstance(message, Snapshot):
            if message.version >= self.version:
                self._replace(message)
        elif message.version > self.version:
            self._check_next(message.version)
            self._set(message.model, message.route)
            self.version = message.version
        self._table.acknowledge(self.version)

    def advance(self, version: int) -> None:
        """Acknowledge a change of the keys, which has been applied. It has the next version."""
        if version > self.version:
            self._check_next(version)
            self.version = version
        self._table.acknowledge(self.version)

    def _check_next(self, version: int) -> None:
        if version != self.version + 1:
            raise RuntimeError(
                f"routing table is at version {self.version} but the next delta is "
                f"{version}: a delta was lost"
            )

    @property
    def workers(self) -> int:
        """The number of worker processes that share the load table."""
        return self._table.columns - 1

    def find(self, model: str) -> RoutedModel | None:
        """The model with this name, if it exists."""
        return self.models.get(model)

    def __iter__(self) -> Iterator[RoutedModel]:
        return iter(self.models.values())

    def __len__(self) -> int:
        return len(self.models)

    def move_off_ejected(self) -> None:
        """Move requests off endpoints that any worker has ejected; see `RoutedModel`.

        Cheap while nothing fails, so it can be called periodically.
        """
        health_events = self._table.health_events()
        if health_events != self._health_events or self._any_ejected:
            self._health_events = health_events
            self._any_ejected = False
            for routed in self.models.values():
                if routed.ring.ejected_count():
                    self._any_ejected = True
                    routed.move_off_ejected()

    def expire(self) -> None:
        """Stop counting prompts as pending that are believed to be computed by now."""
        for routed in self.models.values():
            routed.picker.expire()

    def dispatch(self, *, is_tick: bool = False) -> None:
        """Serve waiting requests: after a wake-up, or (``is_tick``) periodically."""
        if not is_tick:
            self.queues.take_wakes()
        for routed in self.models.values():
            if routed.queue:
                routed.queue.dispatch(is_tick=is_tick)

    def close(self) -> None:
        """Remove all models and close their endpoints' upstreams."""
        for model in list(self.models):
            self._set(model, None)

    def _replace(self, snapshot: Snapshot) -> None:
        for gone in self.models.keys() - {route.model for route in snapshot.routes}:
            self._set(gone, None)
        for route in snapshot.routes:
            self._set(route.model, route)
        self.version = snapshot.version

    def _set(self, model: str, route: Route | None) -> None:
        known = self.models.get(model)
        self._set_names(model, () if known is None else known.route.aliases, route)
        if known is not None and (route is None or not known.is_life_of(route)):
            del self.models[model]
            known.end()
            known = None
        if route is None:
            return
        if known is None:
            self.models[model] = RoutedModel(
                self._table, route, self._make_connections, self.queues, self._clock, self._index
            )
        else:
            known.update(route)

    def _set_names(self, model: str, before: tuple[str, ...], route: Route | None) -> None:
        """Set a Model's aliases.

        While two Models briefly claim the same alias, the later update wins.
        """
        now = () if route is None else route.aliases
        for alias in before:
            if alias not in now and self.aliases.get(alias) == model:
                del self.aliases[alias]
        for alias in now:
            if alias not in before or alias not in self.aliases:
                self.aliases[alias] = model
        if route is not None and route.canary:
            self.canaried.add(model)
        else:
            self.canaried.discard(model)


class RoutedModel(RoutedFields):
    """One model's route, ring and waiting requests."""

    def __init__(
        self,
        table: LoadTable,
        route: Route,
        make_connections: Callable[[RoutedModel, Endpoint], EndpointConnections],
        queues: QueueTable,
        clock: Callable[[], float] | None = None,
        index: PrefixIndex | None = None,
    ) -> None:
        self.model = route.model
        self.route = replace(route, endpoints=())
        self.ring = Ring(
            table,
            route.row,
            route.generation,
            replication=route.replication,
            mean_load_factor=route.mean_load_factor,
            clock=clock,
        )
        self.picker = Picker(self.ring, index)
        self.queue = ModelQueue(self, queues, route.row, route.generation)
        self._queues = queues
        self._table = table
        self._make_connections = make_connections
        self._endpoints: dict[str, Endpoint] = {}  # the route's, by name
        self._upstreams: dict[str, EndpointConnections] = {}  # by endpoint name
        # Removed, with requests still waiting.
        self._departed: list[tuple[Endpoint, EndpointConnections]] = []
        self._gone = False
        self.changes = Changes()
        self.update(route)

    # -- for exchanges -----------------------------------------------------------------------------

    def pick(
        self, prompt: Prompt, adapter: str | None = None, exclude: Iterable[str] = ()
    ) -> Reservation | None:
        """Pick an endpoint and count a request on it; None if no endpoint can serve it now.

        The request may pass waiting ones. ``exclude``: names of endpoints that must not be picked.
        """
        return self.picker.pick(prompt, adapter, exclude)

    def pick_new(
        self, prompt: Prompt, adapter: str | None = None, tenant: str = ""
    ) -> Reservation | None:
        """Like ``pick`` for a request that has not waited; None also if others wait."""
        return self.picker.pick_new(prompt, adapter, tenant)

    def is_full(self, adapter: str | None = None) -> bool:
        """Whether each endpoint that can serve the adapter has reached the capacity."""
        return self.can_serve(adapter) and not self.picker.has_room(adapter)

    def pick_among(
        self,
        fits: Callable[[EndpointConnections], bool],
        prompt: Prompt,
        adapter: str | None = None,
        exclude: Iterable[str] = (),
    ) -> Reservation | None:
        """Like ``pick``, but only among endpoints whose upstream satisfies ``fits``."""
        unfit = [name for name, upstream in self._upstreams.items() if not fits(upstream)]
        return self.pick(prompt, adapter, (*exclude, *unfit))

    def pick_only(self, endpoint: str, prompt: Prompt) -> Reservation | None:
        """Like ``pick``, but only this endpoint, full or not; None if it is not in the route."""
        others = [name for name in self._endpoints if name != endpoint]
        return self.picker.pick_beyond_capacity(prompt, None, others)

    def first(
        self,
        fits: Callable[[EndpointConnections], bool],
        adapter: str | None = None,
        exclude: Collection[str] = (),
    ) -> EndpointConnections | None:
        """The upstream of the first endpoint that serves the adapter and satisfies ``fits``."""
        upstreams = (
            self._upstreams[endpoint.name]
            for endpoint in self.route.endpoints
            if endpoint.name not in exclude and (adapter is None or adapter in endpoint.adapters)
        )
        return next(filter(fits, upstreams), None)

    def admit(self, kind: RequestType = "http") -> Admission:
        """Count a request as active until the Admission is closed."""
        return admit(self._table, self.route.row, self.route.generation, kind)

    def can_serve(self, adapter: str | None = None, exclude: Collection[str] = ()) -> bool:
        """Whether an endpoint outside ``exclude`` serves the adapter (None: the model itself)."""
        if not exclude:
            return self.ring.can_serve(adapter)
        return any(
            endpoint.name not in exclude and (adapter is None or adapter in endpoint.adapters)
            for endpoint in self.route.endpoints
        )

    def block(self, adapter: str | None = None) -> Block | None:
        """Why no endpoint serves the adapter (None: the model itself); None if unknown."""
        if adapter is None or self.route.block is not None:
            return self.route.block
        return self.route.adapter_blocks.get(adapter)

    def serves(self, endpoint: str) -> bool:
        """Whether the endpoint is in the route."""
        return endpoint in self.ring

    def in_flight(self, endpoint: str) -> int:
        """All workers' in-flight requests on an endpoint; 0 if it is not in the route."""
        found = self._find(endpoint)
        return 0 if found is None else self._table.in_flight(found.row)

    def answered(self) -> int:
        """The number of requests that this worker has finished so far with other than a 5xx."""
        outcomes = self._table.outcomes(self.route.row, self._table.column)
        return outcomes["2xx"] + outcomes["3xx"] + outcomes["4xx"]

    # -- health ------------------------------------------------------------------------------------

    def note_failure(self, endpoint: str, now_s: float, unreachable: bool) -> int:
        """Count a failed attempt. Returns the endpoint's failures since its last full response."""
        found = self._find(endpoint)
        if found is None:
            return 0
        return self._table.note_failure(found.row, found.generation, now_s, unreachable)

    def eject(self, endpoint: str, until_s: float) -> bool:
        """Eject an endpoint for all workers. Returns False if it is the model's only endpoint.

        ``until_s``: CLOCK_MONOTONIC seconds; after that the endpoint is half-open until restored.
        If all of a model's endpoints are ejected, picks go to all of them again (panic mode).
        """
        found = self._find(endpoint)
        if found is None or len(self.ring) == 1:
            return False
        self._table.eject(found.row, found.generation, until_s)
        return True

    def restore(self, endpoint: str, now_s: float) -> None:
        """Return an ejected endpoint to service. Its ejection count is kept.

        If all endpoints were ejected, they may all have recovered from a common cause. The others
        then become half-open soon, so that this one does not carry all load until their ejections
        end.
        """
        found = self._find(endpoint)
        if found is None:
            return
        panic = self.ring.ejected_count() == len(self.ring)
        self._table.restore(found.row, found.generation)
        for other in self.route.endpoints if panic else ():
            probe_s = max(now_s, self._table.failed_at(other.row) + PROBE_AFTER_FAILURE_S)
            self._table.half_open(other.row, other.generation, probe_s)

    def recover(self, endpoint: str) -> None:
        """Return an endpoint to service and reset its failure and ejection counts."""
        found = self._find(endpoint)
        if found is not None:
            self._table.recover(found.row, found.generation)

    def ejected_until(self, endpoint: str) -> float:
        """When an endpoint becomes half-open or may be probed again; 0 if it is not ejected."""
        found = self._find(endpoint)
        return 0.0 if found is None else self._table.ejected_until(found.row)

    def ejection_count(self, endpoint: str) -> int:
        """How often any worker has ejected an endpoint since it last recovered."""
        found = self._find(endpoint)
        return 0 if found is None else self._table.ejection_count(found.row)

    def failures(self, endpoint: str) -> int:
        """An endpoint's failed attempts in all workers since its last full response."""
        found = self._find(endpoint)
        return 0 if found is None else self._table.failures(found.row)

    def failed_at(self, endpoint: str) -> float:
        """When an endpoint last failed in any worker (CLOCK_MONOTONIC seconds); 0 if never."""
        found = self._find(endpoint)
        return 0.0 if found is None else self._table.failed_at(found.row)

    def move_off_ejected(self) -> None:
        """Move waiting requests off endpoints that were ejected because they were unreachable.

        An endpoint that was ejected for its responses (503) is alive and may still serve the
        requests that it has. A request sent after the last failure is a probe, and stays.
        """
        for endpoint in self.route.endpoints:
            row = endpoint.row
            if self._table.ejected_until(row) and self._table.unreachable(row):
                failed_s = self._table.failed_at(row)
                self._upstreams[endpoint.name].move_waiting(failed_s)
                for departed, upstream in self._departed:
                    if _is_same_pod(departed, endpoint):
                        upstream.move_waiting(failed_s)

    def _find(self, endpoint: str) -> Endpoint | None:
        return self._endpoints.get(endpoint)

    @property
    def is_gone(self) -> bool:
        """Whether the model was deleted."""
        return self._gone

    # -- for the routing table ---------------------------------------------------------------------

    def is_life_of(self, route: Route) -> bool:
        """Whether ``route`` is for this same model, not for one deleted and created again."""
        return (self.route.row, self.route.generation) == (route.row, route.generation)

    def update(self, route: Route) -> None:
        """Apply the new route; serve or wake waiting requests."""
        old, self.route = self.route, route
        self.picker.configure(route.strategy, route.prefix_char_length, route.cache_load_factor)
        self.picker.limit(route.capacity, self._queues)
        if (old.replication, old.mean_load_factor) != (route.replication, route.mean_load_factor):
            self.ring.configure(
                replication=route.replication, mean_load_factor=route.mean_load_factor
            )
        before = self._endpoints
        self._endpoints = {endpoint.name: endpoint for endpoint in route.endpoints}
        for endpoint in route.endpoints:
            known = before.pop(endpoint.name, None)
            if endpoint != known:
                self._set_endpoint(endpoint, known)
        for name, gone in before.items():
            self.ring.remove(name)
            self._depart(gone)
        self._move_off_departed()
        self.queue.route_changed()
        self.changes.notify()

    def end(self) -> None:
        """The model was deleted: wake all waiting requests and close its connections."""
        self._gone = True
        for name, upstream in self._upstreams.items():
            self.ring.remove(name)
            upstream.close()
        self._upstreams.clear()
        self._departed.clear()
        self.route = replace(self.route, endpoints=())
        self._endpoints.clear()
        self.queue.end()
        self.changes.notify()

    def _set_endpoint(self, endpoint: Endpoint, known: Endpoint | None) -> None:
        place = (endpoint.address, endpoint.row, endpoint.generation)
        moved = known is None or (known.address, known.row, known.generation) != place
        upstream = (
            self._make_connections(self, endpoint) if moved else self._upstreams[endpoint.name]
        )
        self.ring.set(endpoint.name, endpoint.row, endpoint.generation, endpoint.adapters, upstream)
        if known is not None and moved:
            self._depart(known)
        self._upstreams[endpoint.name] = upstream

    def _depart(self, endpoint: Endpoint) -> None:
        upstream = self._upstreams.pop(endpoint.name)
        upstream.close()
        self._departed.append((endpoint, upstream))

    def _move_off_departed(self) -> None:
        """Move waiting requests off endpoints that were removed.

        An endpoint that is draining, or that is back, keeps them, because it will still serve them.
        A request that no other endpoint can take keeps waiting until the route changes again.
        """
        for endpoint, upstream in self._departed:
            present = self._endpoints.get(endpoint.name)
            is_back = present is not None and _is_same_pod(endpoint, present)
            if endpoint.name not in self.route.draining and not is_back:
                upstream.move_waiting()
        self._departed = [each for each in self._departed if each[1].is_waited_on]


def _own_queues(table: LoadTable) -> QueueTable:
    """A queue table for this process alone."""
    queues = QueueTable.create(table.rows, 1)
    queues.column = 0
    return queues


def _is_same_pod(endpoint: Endpoint, other: Endpoint) -> bool:
    return (endpoint.name, endpoint.address) == (other.name, other.address)
