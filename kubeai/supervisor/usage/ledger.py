"""The usage that the workers have reported: sums, and what has not been stored yet."""

from __future__ import annotations

from collections.abc import Container, Iterable

from kubeai.api.usage import KeyUsage, UsageCounts
from kubeai.routing.usage import UsageRow


class UsageLedger:
    """Sums of the workers' reports. Bounded by the keys and Models that are used."""

    def __init__(self) -> None:
        self.totals: dict[str, KeyUsage] = {}  # by key, since the process started
        self._pending: dict[str, KeyUsage] = {}  # by key, since `take`

    def add(self, rows: Iterable[UsageRow], day: str) -> None:
        """Count a report. ``day``: today, UTC: YYYY-MM-DD."""
        for row in rows:
            counts = UsageCounts(*row[3:], day)
            for sums in (self.totals, self._pending):
                usage = sums.get(row.key)
                if usage is None:
                    usage = sums[row.key] = KeyUsage()
                usage.tenant = row.tenant
                usage.counts_of(row.model).add(counts)

    def take(self) -> dict[str, KeyUsage]:
        """What has been counted since the last call, by key."""
        taken, self._pending = self._pending, {}
        return taken

    def put_back(self, pending: dict[str, KeyUsage]) -> None:
        """Return what was taken and could not be stored; `take` returns it again."""
        for key, newer in self._pending.items():
            older = pending.setdefault(key, KeyUsage())
            older.add(newer)
        self._pending = pending

    @property
    def has_pending(self) -> bool:
        """Whether `take` would return anything."""
        return bool(self._pending)

    def retain(self, keys: Container[str], models: Container[str]) -> None:
        """Forget the sums of all other keys and Models."""
        self.totals = {key: usage for key, usage in self.totals.items() if key in keys}
        for usage in self.totals.values():
            usage.models = {name: each for name, each in usage.models.items() if name in models}
