"""The ring and the load table in plain Python: the reference for the compiled ones.

Written from the rules alone, without regard to speed: a table is a set of dictionaries, a ring
a sorted list of pairs. Used by the tests only, for comparisons with hypothesis.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, inf

import mmh3

MASK = (1 << 64) - 1
REQUEST_TOKENS = 256  # what a request in flight counts as
PENDING_MAX = (1 << 25) - 1  # tokens of a cell
IN_FLIGHT_MAX = (1 << 22) - 1  # requests of the peers


Cells = list[tuple[int, int]]  # row and generation, of an endpoint and of its model


class OracleTable:
    """Cells by (row, column), each row's generation, and when each row's ejection ends."""

    def __init__(self, workers: int) -> None:
        self.columns = workers + 1
        self.generations: Counter[int] = Counter()
        self.in_flight: Counter[tuple[int, int]] = Counter()
        self.pending: Counter[tuple[int, int]] = Counter()
        self.active: Counter[tuple[int, int, str]] = Counter()
        self.held: Counter[tuple[int, int]] = Counter()
        self.lookups: Counter[tuple[int, str]] = Counter()
        self.iterations: list[int] = []
        self.column_active: Counter[int] = Counter()
        self.ejected: dict[int, float] = {}
        self.peers = 0
        self.settled: Counter[tuple[int, str]] = Counter()  # in 256ths
        self.ended: Counter[int] = Counter()

    def gauges(self) -> tuple[Counter, ...]:
        return (self.in_flight, self.pending, self.active, self.held)

    def open_row(self, row: int) -> int:
        self.generations[row] += 1
        self.ejected.pop(row, None)
        self.settled[row, "in flight"] = self.settled[row, "pending"] = self.ended[row] = 0
        for gauge in self.gauges():
            for cell in [cell for cell in gauge if cell[0] == row]:
                del gauge[cell]
        for which in ("initial", "final", "default"):
            self.lookups[row, which] = 0
        return self.generations[row]

    def clear_column(self, column: int) -> None:
        for gauge in self.gauges():
            for cell in [cell for cell in gauge if cell[1] == column]:
                del gauge[cell]
        self.column_active[column] = 0

    def row_sum(self, gauge: Counter, row: int) -> int:
        return sum(count for cell, count in gauge.items() if cell[0] == row)

    def here(self, gauge: Counter, row: int) -> int:
        return self.row_sum(gauge, row) - gauge[row, self.columns - 1]

    def work(self, row: int, per_request: int = REQUEST_TOKENS) -> int:
        return self.row_sum(self.pending, row) + per_request * self.row_sum(self.in_flight, row)

    def expected(self, row: int, per_request: int = REQUEST_TOKENS) -> int:
        here = self.here(self.pending, row) + per_request * self.here(self.in_flight, row)
        told = self.settled[row, "pending"] + per_request * self.settled[row, "in flight"]
        return self.work(row, per_request) + self.peers * (256 * here - told) // 256

    def set_peers(self, row: int, generation: int, in_flight: int, pending: int) -> None:
        if self.generations[row] == generation > 0:
            self.in_flight[row, self.columns - 1] = min(in_flight, IN_FLIGHT_MAX)
            self.pending[row, self.columns - 1] = min(pending, PENDING_MAX)

    def settle(self, steps: int) -> None:
        for row in self.generations:
            for which, gauge in (("in flight", self.in_flight), ("pending", self.pending)):
                difference = 256 * self.here(gauge, row) - self.settled[row, which]
                step = abs(difference) // steps * (1 if difference > 0 else -1)  # towards zero
                self.settled[row, which] += step or difference

    def pick(self, cells: Cells, column: int, tokens: int) -> int:
        """Count a pick in its endpoint's row and its model's; returns the tokens counted."""
        model_row, _ = cells[1]
        counted = min(tokens, PENDING_MAX - min(PENDING_MAX, self.pending[model_row, column]))
        for row, generation in cells:
            self.up(self.in_flight, (row, column), generation)
            self.up(self.pending, (row, column), generation, counted)
        return counted

    def prefilled(self, cells: Cells, column: int, tokens: int) -> None:
        for row, generation in cells:
            self.down(self.pending, (row, column), generation, tokens)

    def release(self, cells: Cells, column: int, tokens: int) -> None:
        self.prefilled(cells, column, tokens)
        for row, generation in cells:
            self.down(self.in_flight, (row, column), generation)

    def up(self, gauge: Counter, cell: tuple, generation: int, by: int = 1) -> None:
        if self.generations[cell[0]] == generation > 0:
            gauge[cell] += by

    def down(self, gauge: Counter, cell: tuple, generation: int, by: int = 1) -> None:
        if self.generations[cell[0]] == generation > 0:
            gauge[cell] = max(0, gauge[cell] - by)


@dataclass
class OraclePick:
    name: str
    first: str
    first_load: float
    own_load: float
    bound: int
    iterations: int
    initial: str
    defaulted: bool


@dataclass
class OracleEndpoint:
    row: int
    generation: int
    adapters: frozenset[str] = frozenset()


def mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def places(name: str, replication: int) -> list[int]:
    start = mmh3.hash64(name.encode(), signed=False)[0]
    return [mix((start + i * 0x9E3779B97F4A7C15) & MASK) >> 20 for i in range(1, replication + 1)]


Names = set[str]  # the oracle has a method named set


class OracleRing:
    """Makes the ring's decisions; counts nothing itself."""

    def __init__(self, table: OracleTable, replication: int, mean_load_factor: int) -> None:
        self.table = table
        self.floor = 2
        self.replication = replication
        self.mean_load_factor = mean_load_factor
        self.endpoints: dict[str, OracleEndpoint] = {}

    def set(self, name: str, row: int, generation: int, adapters: frozenset[str]) -> None:
        self.endpoints[name] = OracleEndpoint(row, generation, adapters)

    def remove(self, name: str) -> None:
        self.endpoints.pop(name, None)

    def clockwise(self, key: int) -> list[str]:
        """Every endpoint once, in the order in which a walk from the key meets them."""
        ring = sorted(
            (place, name) for name in self.endpoints for place in places(name, self.replication)
        )
        start = mix(key) >> 20
        ahead = [name for place, name in ring if place >= start]
        behind = [name for place, name in ring if place < start]
        return list(dict.fromkeys(ahead + behind))

    def work(self, name: str) -> int:
        return self.table.work(self.endpoints[name].row)

    def able(self, adapter: str | None) -> Names:
        return {
            name for name, e in self.endpoints.items() if adapter is None or adapter in e.adapters
        }

    def who_can_serve(
        self, adapter: str | None, exclude: frozenset[str], now_s: float
    ) -> tuple[Names, Names]:
        """Return (the endpoints that the mean covers, the endpoints that may be chosen)."""
        able = self.able(adapter)
        healthy = {n for n in able if self.table.ejected.get(self.endpoints[n].row, -inf) <= now_s}
        if healthy - exclude:
            return healthy, healthy - exclude
        return able, able - exclude

    def pick_hashed(
        self, key: int, adapter: str | None, exclude: frozenset[str], now_s: float, tokens: int
    ) -> OraclePick | None:
        counted, allowed = self.who_can_serve(adapter, exclude, now_s)
        if not allowed:
            return None
        own = Fraction(REQUEST_TOKENS + tokens, REQUEST_TOKENS)  # all loads in requests
        loads = {name: Fraction(self.work(name), REQUEST_TOKENS) for name in counted | allowed}
        mean = (sum(loads[name] for name in counted) + own) / len(counted)
        bound = max(self.floor - 1 + ceil(own), ceil(self.mean_load_factor * mean / 100))
        walk = self.clockwise(key)
        on_the_way = [name for name in walk if name in allowed]
        within = [name for name in on_the_way if loads[name] + own <= bound]
        chosen = within[0] if within else on_the_way[0]
        looked_at = walk.index(chosen if within else on_the_way[-1]) + 1
        first = on_the_way[0]
        return OraclePick(
            chosen,
            first,
            float(loads[first]),
            float(own),
            bound,
            looked_at,
            walk[0],
            defaulted=not within,
        )

    def least(self, adapter: str | None, exclude: frozenset[str], now_s: float) -> Names:
        """All endpoints that a least-load pick may choose."""
        _, allowed = self.who_can_serve(adapter, exclude, now_s)
        least = min((self.expected(name) for name in allowed), default=0)
        return {name for name in allowed if self.expected(name) == least}

    def expected(self, name: str) -> int:
        return self.table.expected(self.endpoints[name].row)

    def lookup(self, key: int, adapter: str | None) -> str | None:
        able = self.able(adapter)
        return next((name for name in self.clockwise(key) if name in able), None)
