"""What the console shows of workers, Models and replicas: its JSON values, and how they are made.

:class:`Fleet` reads the operator's view, the routes, the load table and the traffic when someone
looks. All times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from kubeai._load import LoadTable
from kubeai._ring import Ring
from kubeai.api.model import Model
from kubeai.api.objects import Condition
from kubeai.operator.view import ModelView, OperatorView, PodView, Step
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Route
from kubeai.supervisor.console.traffic import Rates, TimesToFirstToken, Traffic

Word = Literal["Ready", "Starting", "Scaled to zero", "Degraded", "Failed", "Deleting"]


class Can(msgspec.Struct, frozen=True):
    """The changes that KubeAI's service account may make."""

    scale: bool = False
    apply: bool = False
    delete: bool = False


class Worker(msgspec.Struct, frozen=True):
    """One worker process."""

    worker: int
    ready: bool
    restarts: int


class Replicas(msgspec.Struct, frozen=True):
    """Numbers of a Model's replicas. ``min`` and ``max`` bound ``desired``; None: unlimited."""

    ready: int
    desired: int
    min: int
    max: int | None

    @classmethod
    def of(cls, view: ModelView) -> Replicas:
        """Those of a Model. Without autoscaling, its bounds do not apply."""
        spec = view.model.spec
        if spec.autoscaling_disabled:
            return cls(view.ready, view.desired, 0, None)
        return cls(view.ready, view.desired, spec.min_replicas, spec.max_replicas)


class ModelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One Model in the list."""

    name: str
    state: Word
    reason: str
    message: str
    engine: str
    url: str
    features: tuple[str, ...]
    owner: str
    strategy: str
    adapters: tuple[str, ...]
    replicas: Replicas
    in_flight: int
    held: int
    rates: Rates
    ttft_s: TimesToFirstToken


class State(msgspec.Struct, frozen=True, kw_only=True):
    """The list of Models and workers. ``stream_problems``: what is not connected, and why.

    ``keys``: whether clients need an API key.
    """

    version: str
    time_s: float
    local: bool
    namespace: str
    synced: bool
    can: Can
    workers: Sequence[Worker]
    stream_problems: Sequence[str]
    models: Sequence[ModelSummary]
    keys: bool


class ConditionView(msgspec.Struct, frozen=True):
    """One condition of a Model."""

    type: str
    status: str
    reason: str
    message: str
    last_transition_s: float | None


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of a Model."""

    name: str
    address: str
    phase: str
    ready: bool
    reason: str
    message: str
    in_flight: int
    pending_tokens: int
    ring_share: float | None  # of the keys; None: not on a ring
    cached_share: float | None  # of prompt tokens, as the engine reports; None: it does not
    restarts: int
    ejected: bool
    created_s: float


class ModelDetails(ModelSummary, frozen=True, kw_only=True):
    """One Model by itself."""

    conditions: Sequence[ConditionView]
    pods: Sequence[Replica]
    timeline: Sequence[Step]
    yaml: str


class Fleet:
    """Makes the values of Models. See the module."""

    def __init__(
        self, operator: OperatorView, publisher: Publisher, table: LoadTable, traffic: Traffic
    ) -> None:
        self._operator = operator
        self._publisher = publisher
        self._table = table
        self._traffic = traffic

    def models(self) -> list[ModelSummary]:
        """All Models, sorted by name."""
        views = sorted(self._operator.models(), key=lambda view: view.name)
        return [self._summary(view) for view in views]

    def model(self, name: str) -> ModelView | None:
        """The operator's view of one Model, if it exists."""
        return self._operator.model(name)

    def details(self, view: ModelView, yaml: str) -> ModelDetails:
        """One Model by itself. ``yaml``: its manifest."""
        route = self._publisher.route(view.name)
        rows = self._publisher.endpoint_rows(view.name)
        shares = _ring_shares(self._table, route)
        return ModelDetails(
            **msgspec.structs.asdict(self._summary(view)),
            conditions=[_condition(c) for c in view.model.status.conditions],
            pods=[self._replica(view, pod, rows.get(pod.name), shares) for pod in view.pods],
            timeline=self._operator.timeline(view.name),
            yaml=yaml,
        )

    def _summary(self, view: ModelView) -> ModelSummary:
        name, spec = view.name, view.model.spec
        row, route = self._publisher.row(name), self._publisher.route(name)
        word, reason, message = state_of(view.model)
        if reason == "ReplicasStarting" and route is not None and route.progress:
            message = route.progress  # the condition only counts replicas
        return ModelSummary(
            name=name,
            state=word,
            reason=reason,
            message=message,
            engine=spec.engine,
            url=spec.url,
            features=spec.features,
            owner=spec.owner,
            strategy=spec.load_balancing.strategy,
            adapters=tuple(adapter.name for adapter in spec.adapters),
            replicas=Replicas.of(view),
            in_flight=0 if row is None else self._table.in_flight(row),
            held=0 if row is None else self._table.held(row),
            rates=self._traffic.rates(name),
            ttft_s=self._traffic.times_to_first_token(name),
        )

    def _replica(
        self, view: ModelView, pod: PodView, row: int | None, shares: dict[str, float]
    ) -> Replica:
        return Replica(
            name=pod.name,
            address=pod.address,
            phase=pod.phase,
            ready=pod.ready,
            reason=pod.reason,
            message=pod.message,
            in_flight=0 if row is None else self._table.in_flight(row),
            pending_tokens=0 if row is None else self._table.pending(row),
            ring_share=shares.get(pod.name),
            cached_share=self._traffic.cached_share(view.name, pod.name),
            restarts=pod.restarts,
            ejected=row is not None and self._table.ejected_until(row) > 0,
            created_s=pod.created_s,
        )


def state_of(model: Model) -> tuple[Word, str, str]:
    """A Model's state in a word, the reason as one word, and the message of its condition."""
    conditions = {condition.type: condition for condition in model.status.conditions}
    ready, degraded = conditions.get("Ready"), conditions.get("Degraded")
    if model.metadata.deletion_timestamp is not None:
        return "Deleting", "Deleting", "the Model is being deleted"
    if ready is None:  # the operator has not seen it yet
        return "Starting", "", ""
    if degraded is not None and degraded.status == "True":
        word: Word = "Degraded" if ready.status == "True" else "Failed"
        return word, degraded.reason, degraded.message
    if ready.reason == "ScaledToZero":
        return "Scaled to zero", ready.reason, ready.message
    return "Ready" if ready.status == "True" else "Starting", ready.reason, ready.message


def _condition(condition: Condition) -> ConditionView:
    since = condition.last_transition_time
    return ConditionView(
        condition.type,
        condition.status,
        condition.reason,
        condition.message,
        None if since is None else since.timestamp(),
    )


def _ring_shares(table: LoadTable, route: Route | None) -> dict[str, float]:
    """By endpoint, the share of all keys that map to it; empty if the Model has no ring."""
    if route is None or route.strategy == "LeastLoad":
        return {}
    ring = Ring(table, route.row, route.generation, replication=route.replication)
    for endpoint in route.endpoints:
        ring.set(endpoint.name, endpoint.row, endpoint.generation)
    return ring.shares()
