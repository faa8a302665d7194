"""API keys for tests: their rows in a key table, a clock, and requests that carry one."""

import hashlib
from typing import Any

from fakes.world import World
from kubeai._key_table import KeyTable, Use
from kubeai._keys import Key
from kubeai.routing.keys import KeyRecord


class Clock:
    """A clock that only moves when it is told to. Intervals of the key table begin at 1,000 s."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class Rows:
    """The rows of keys, as the publisher of keys assigns them."""

    def __init__(self, table: KeyTable) -> None:
        self._table = table
        self.rows: dict[str, tuple[int, int]] = {}
        self.owners: dict[int, str] = {}

    def add(self, name: str) -> tuple[int, int]:
        """Row and generation of a key, which is added if it is new."""
        if name not in self.rows:
            row = len(self.owners)
            self.rows[name] = row, self._table.open_row(row)
            self.owners[row] = name
        return self.rows[name]

    def remove(self, name: str) -> None:
        del self.rows[name]


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def key_for(rows: Rows, name: str, **limits: Any) -> Key:
    """The key whose secret is ``sk-<name>``."""
    row, generation = rows.add(name)
    digest = digest_of(f"sk-{name}")
    return Key(KeyRecord(name, digest, name, row=row, generation=generation, **limits))


class KeyedWorld:
    """A World whose requests belong to keys with limits, and the key table's other side."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.table = KeyTable.create(8, 1)
        self.clock = self.table.clock = Clock()
        self.rows = Rows(self.table)
        world.context.limits = KeyTable.attach(self.table.fd, 0)
        world.context.limits.clock = self.clock

    def add(self, name: str, **limits: Any) -> None:
        key = key_for(self.rows, name, **limits)
        self.world.context.keys[key.digest] = key

    def use(self, name: str) -> Use:
        return self.table.use(self.rows.rows[name][0])

    def close(self) -> None:
        for table in (self.world.context.limits, self.table):
            table.close()


def bearer(name: str) -> str:
    """The header of a request with the key of this name."""
    return f"Authorization: Bearer sk-{name}"
