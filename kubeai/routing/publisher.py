"""The supervisor's side of the routing table.

:class:`Publisher` assigns rows of the load table to each model and its endpoints, and a version to
each change. Every worker that has applied version v has the same view as the Publisher had at
version v.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai._queue_table import QueueTable
from kubeai.errors import KubeAIError
from kubeai.routing.routes import Delta, Route, Snapshot
from kubeai.routing.rows import Rows

# What an engine's cache is believed to hold. Blocks that it evicts earlier cost a worse pick.
CACHE_TOKENS = 200_000


class RowOwner(msgspec.Struct, frozen=True):
    """The model or the endpoint that a row of the load table belongs to."""

    model: str
    endpoint: str = ""


class Publisher:
    """Assigns a row of the load table to every model and endpoint, and a version to every change.

    A row has one owner at a time. It is dropped when its model or endpoint is removed, and reused
    only once every live worker has acknowledged the version that dropped it and all its cells are
    0. Until then requests may still be counted in it, and it stays in ``owners`` and ``rows_of``.
    """

    def __init__(
        self,
        table: LoadTable,
        index: PrefixIndex | None = None,
        queues: QueueTable | None = None,
    ) -> None:
        self.version = 0
        self._table = table
        self._index = index
        self._queues = queues
        self._routes: dict[str, Route] = {}
        self._rows = Rows(table)
        self.owners: dict[int, RowOwner] = {}  # by row in use
        self.rows_of: dict[RowOwner, set[int]] = {}  # two rows for an endpoint that was added again

    def update(self, model: str, route: Route | None) -> Delta | None:
        """Set a model's route (rows and the order of endpoints are ignored) or remove it (None).

        Returns None if nothing changed. KubeAIError if the table is full; nothing is changed then.
        """
        old = self._routes.get(model)
        if route is None:
            if old is None:
                return None
            del self._routes[model]
            new = None
        else:
            new = self._with_rows(route, old)
            if new == old:
                return None
            self._routes[model] = new
        self.version += 1
        for row in _rows(old) - _rows(new):
            self._table.set_peers(row, self._table.generation(row), 0)
            self._rows.drop(row, self.version)
        return Delta(self.version, model, new)

    def advance(self) -> int:
        """Assign the next version to a change of something else that workers apply in order."""
        self.version += 1
        return self.version

    def snapshot(self) -> Snapshot:
        """All routes, for a worker that starts."""
        return Snapshot(self.version, tuple(self._routes.values()))

    def reclaim(self, acknowledged: Iterable[int]) -> list[RowOwner]:
        """Free dropped rows that are no longer used, and return their owners.

        ``acknowledged``: the version that each live worker has applied.
        """
        freed = []
        for row in self._rows.reclaim(acknowledged, self.version):
            owner = self.owners.pop(row)
            freed.append(owner)
            self.rows_of[owner].remove(row)
            if not self.rows_of[owner]:
                del self.rows_of[owner]
        return freed

    def models(self) -> list[str]:
        """The names of all published models."""
        return list(self._routes)

    def row(self, model: str) -> int | None:
        """A model's row in the load table; None for an unknown model."""
        route = self._routes.get(model)
        return None if route is None else route.row

    def endpoint_rows(self, model: str) -> dict[str, int]:
        """Endpoint name → row; empty for an unknown model."""
        route = self._routes.get(model)
        return {} if route is None else {e.name: e.row for e in route.endpoints}

    def route(self, model: str) -> Route | None:
        """A model's route as published, with rows and generations."""
        return self._routes.get(model)

    def in_use(self, model: str, endpoint: str) -> bool:
        """Whether a worker may still send requests to an endpoint, or still has some in flight."""
        return RowOwner(model, endpoint) in self.rows_of

    def _with_rows(self, route: Route, old: Route | None) -> Route:
        known = {} if old is None else {e.name: e for e in old.endpoints}
        wanted = {e.name: e for e in route.endpoints}
        fresh = [name for name in wanted if name not in known]
        rows = iter(self._open_rows(len(fresh) + (old is None)))
        if old is not None:
            row, generation = old.row, old.generation
        else:
            row, generation = self._own(next(rows), RowOwner(route.model))
        endpoints = []
        for name in sorted(wanted):
            if (before := known.get(name)) is not None:
                lease = before.row, before.generation
            else:
                lease = self._own(next(rows), RowOwner(route.model, name))
            endpoints.append(replace(wanted[name], row=lease[0], generation=lease[1]))
        return replace(route, endpoints=tuple(endpoints), row=row, generation=generation)

    def _own(self, lease: tuple[int, int], owner: RowOwner) -> tuple[int, int]:
        self.owners[lease[0]] = owner
        self.rows_of.setdefault(owner, set()).add(lease[0])
        return lease

    def _open_rows(self, count: int) -> list[tuple[int, int]]:
        """Open ``count`` rows and return them with their generations; KubeAIError if too few."""
        if count > self._rows.room:
            raise KubeAIError(
                f"the load table is full: of {self._table.rows} rows, {self._rows.dropped} belong "
                "to removed models or endpoints that workers may still use"
            )
        opened = []
        for _ in range(count):
            row, generation = self._rows.open()
            opened.append((row, generation))
            if self._queues is not None:
                self._queues.open_row(row)
            if self._index is not None:
                self._index.set_cache(row, CACHE_TOKENS)
                self._index.forget(row)  # it was another pod's, or the engine has restarted
        return opened


def _rows(route: Route | None) -> set[int]:
    return set() if route is None else {route.row, *(e.row for e in route.endpoints)}
