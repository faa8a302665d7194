"""The supervisor's side of the API keys.

:class:`KeyPublisher` assigns each key a row of the key table, and each change a version from the
sequence of the routing table, so that workers acknowledge routes and keys together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from msgspec.structs import asdict

from kubeai.api.api_key import ApiKey
from kubeai.errors import KubeAIError
from kubeai.routing.keys import KeyDelta, KeyRecord, KeySnapshot
from kubeai.routing.rows import Rows, RowTable


class KeyPublisher:
    """Assigns rows and versions to keys.

    A key keeps its row while its Secret has a valid key, also when its limits or the key itself
    change. The row is reused only once every live worker has acknowledged the version that dropped
    it and no request is in flight in it. A key for which there is no row waits for one.
    """

    def __init__(self, table: RowTable, advance: Callable[[], int]) -> None:
        """``advance``: assigns the next version; see :meth:`.Publisher.advance`."""
        self._table = table
        self._advance = advance
        self._keys: dict[str, KeyRecord] = {}
        self._rows = Rows(table)
        self._waiting: dict[str, ApiKey] = {}  # by Secret, in order: keys without a row
        self.rows: dict[str, tuple[int, int]] = {}  # row and generation, by Secret of a key
        self.owners: dict[int, str] = {}  # the Secret, by row in use

    def __len__(self) -> int:
        return len(self._keys)

    def update(self, name: str, key: ApiKey | None) -> KeyDelta | None:
        """Set the key of a Secret, or remove it (None). Returns None if nothing changed.

        KubeAIError if the table is full: the key then waits; see :meth:`reclaim`.
        """
        old = self._keys.get(name)
        self._waiting.pop(name, None)
        if key is None:
            if old is None:
                return None
            del self._keys[name], self.rows[name]
            version = self._advance()
            self._rows.drop(old.row, version)
            return KeyDelta(version, name, None)
        try:
            row, generation = (old.row, old.generation) if old is not None else self._open_row()
        except KubeAIError:
            self._waiting[name] = key
            raise
        new = KeyRecord(**asdict(key), row=row, generation=generation)
        if new == old:
            return None
        self._keys[name] = new
        self.rows[name] = row, generation
        self.owners[row] = name
        return KeyDelta(self._advance(), name, new)

    def snapshot(self, version: int) -> KeySnapshot:
        """All keys, for a worker that starts. ``version``: the last one assigned."""
        return KeySnapshot(version, tuple(self._keys.values()))

    def names(self) -> Collection[str]:
        """The names of all keys' Secrets."""
        return self._keys.keys()

    def reclaim(self, acknowledged: Iterable[int], version: int) -> list[KeyDelta]:
        """Free dropped rows that are no longer used, and give them to keys that wait for one.

        ``acknowledged``: the version that each live worker has applied; ``version``: the last one
        assigned. Returns the changes, in order.
        """
        for row in self._rows.reclaim(acknowledged, version):
            del self.owners[row]
        ready = list(self._waiting.items())[: self._rows.room]
        return [delta for name, key in ready if (delta := self.update(name, key)) is not None]

    def _open_row(self) -> tuple[int, int]:
        if not self._rows.room:
            raise KubeAIError(
                f"the key table is full: of {self._table.rows} rows, {self._rows.dropped} belong "
                "to removed keys that workers may still use"
            )
        return self._rows.open()
