"""Objects, revisions and recent events: in memory for reads, in SQLite for persistence.

Owns the database file (WAL, written by one thread of this process only) and the revision counter
behind resourceVersions. Each write is one transaction with the object and the counter, so an
acknowledged write survives a SIGKILL, and revisions are never reused. Knows nothing of Kubernetes
beyond ``metadata``: the registry implements the rules, and watches read the window of events.

Stored objects are shared and must not be mutated: copy an object before changing it.
"""

from __future__ import annotations

import asyncio
import bisect
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

Object = dict[str, Any]
Key = tuple[str, str]  # (namespace, name); namespace is "" for cluster-wide objects

WINDOW_MAX_EVENTS = 8192
WINDOW_MAX_BYTES = 64 << 20
LOCK_TIMEOUT_S = 2.0  # how long to wait for a previous process to release the file

_TABLES = """
CREATE TABLE IF NOT EXISTS objects (
    resource TEXT, namespace TEXT, name TEXT, revision INTEGER NOT NULL, object BLOB NOT NULL,
    PRIMARY KEY (resource, namespace, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counter (one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER);
INSERT OR IGNORE INTO counter VALUES (1, 1);
"""


class Expired(Exception):
    """The requested events are not, or no longer, in the window."""


@dataclass(slots=True, frozen=True)
class Stored:
    """One version of an object, with its encoded JSON."""

    object: Object
    raw: bytes
    revision: int

    @property
    def metadata(self) -> Object:
        """The object's metadata."""
        metadata: Object = self.object["metadata"]
        return metadata

    @property
    def uid(self) -> str:
        """The object's uid."""
        return str(self.metadata["uid"])


@dataclass(slots=True, frozen=True)
class Event:
    """One write. `new` is None for a deletion, `old` is None for a creation.

    `last` is `new`, or for a deletion the object's last state with the deletion's revision.
    """

    revision: int
    resource: str
    key: Key
    new: Stored | None
    old: Stored | None
    last: Stored

    @property
    def type(self) -> Literal["ADDED", "MODIFIED", "DELETED"]:
        """The event's type, for a watch without a selector."""
        if self.new is None:
            return "DELETED"
        return "ADDED" if self.old is None else "MODIFIED"


class _Window:
    """The recent events of one resource, oldest first."""

    def __init__(self, floor: int) -> None:
        self.floor = floor  # all events with a higher revision are in the window
        self._events: list[Event] = []
        self._bytes = 0

    def add(self, event: Event) -> None:
        self._events.append(event)
        self._bytes += len(event.last.raw)
        if len(self._events) > WINDOW_MAX_EVENTS or self._bytes > WINDOW_MAX_BYTES:
            self._forget()

    def _forget(self) -> None:
        """Drop a quarter of the events at once, to amortise the cost of moving the list."""
        drop = max(1, len(self._events) // 4)
        while drop < len(self._events) and (
            sum(len(event.last.raw) for event in self._events[drop:]) > WINDOW_MAX_BYTES
        ):
            drop += max(1, (len(self._events) - drop) // 2)
        self._bytes -= sum(len(event.last.raw) for event in self._events[:drop])
        self.floor = self._events[drop - 1].revision
        del self._events[:drop]

    def since(self, revision: int) -> list[Event]:
        if revision < self.floor:
            raise Expired
        start = bisect.bisect_right(self._events, revision, key=lambda event: event.revision)
        return self._events[start:]


class Store:
    """All objects. Reads are in memory; each write is one SQLite transaction on this thread.

    A commit takes some tens of µs: WAL with synchronous=NORMAL writes to the page cache, which
    outlives the process. A power failure may lose the last writes but does not corrupt the file.
    """

    def __init__(self, path: Path | str) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, timeout=LOCK_TIMEOUT_S)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
        self._db.executescript(_TABLES)
        (self.revision,) = self._db.execute("SELECT revision FROM counter").fetchone()
        self._objects: dict[str, dict[Key, Stored]] = defaultdict(dict)
        self._windows: dict[str, _Window] = {}
        self._floor = self.revision
        self._waiters: dict[str, set[asyncio.Event]] = defaultdict(set)
        self._dependents: dict[str, set[tuple[str, Key]]] = defaultdict(set)
        self._uids: dict[str, tuple[str, Key]] = {}
        self.listeners: list[Callable[[Event], None]] = []
        for resource, namespace, name, revision, raw in self._db.execute(
            "SELECT resource, namespace, name, revision, object FROM objects"
        ):
            stored = Stored(orjson.loads(raw), raw, revision)
            self._objects[resource][namespace, name] = stored
            self._index(resource, (namespace, name), None, stored)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    # Reads.

    def get(self, resource: str, key: Key) -> Stored | None:
        """Return the object, or None if it does not exist."""
        return self._objects[resource].get(key)

    def items(self, resource: str, namespace: str = "") -> list[Stored]:
        """Return objects sorted by namespace and name, of all namespaces if none is given."""
        return _sorted(self._objects[resource], namespace)

    def items_at(self, resource: str, revision: int, namespace: str = "") -> list[Stored]:
        """Like `items`, at an earlier revision. Raises Expired."""
        if revision > self.revision:
            raise Expired
        then = dict(self._objects[resource])
        for event in reversed(self._window(resource).since(revision)):
            if event.old is None:
                then.pop(event.key, None)
            else:
                then[event.key] = event.old
        return _sorted(then, namespace)

    def by_uid(self, uid: str) -> tuple[str, Key] | None:
        """Return the resource and key of the existing object with this uid."""
        return self._uids.get(uid)

    def dependents(self, uid: str) -> list[tuple[str, Key]]:
        """Return the objects with an owner reference to this uid."""
        return sorted(self._dependents.get(uid, ()))

    def all(self) -> Iterable[tuple[str, Key, Stored]]:
        """Yield all objects, of all resources."""
        for resource, objects in list(self._objects.items()):
            for key, stored in list(objects.items()):
                yield resource, key, stored

    # Writes.

    def put(self, resource: str, key: Key, obj: Object) -> Stored:
        """Store `obj` as the object's new version. Takes ownership of `obj`."""
        revision = self.revision + 1
        obj["metadata"]["resourceVersion"] = str(revision)
        stored = Stored(obj, orjson.dumps(obj), revision)
        old = self._objects[resource].get(key)
        self._write(
            revision,
            "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?)",
            (resource, *key, revision, stored.raw),
        )
        self._objects[resource][key] = stored
        self._tell(Event(revision, resource, key, stored, old, stored))
        return stored

    def remove(self, resource: str, key: Key) -> Stored:
        """Delete an object. Returns its last state with the deletion's revision."""
        old = self._objects[resource][key]
        revision = self.revision + 1
        obj = {**old.object, "metadata": {**old.metadata, "resourceVersion": str(revision)}}
        last = Stored(obj, orjson.dumps(obj), revision)
        self._write(
            revision,
            "DELETE FROM objects WHERE resource = ? AND namespace = ? AND name = ?",
            (resource, *key),
        )
        del self._objects[resource][key]
        self._tell(Event(revision, resource, key, None, old, last))
        return last

    def reread(self, resource: str, change: Callable[[Object], Object]) -> None:
        """Change how the stored objects of a resource read, without a new revision or event.

        For changed schemas: new defaults appear when existing objects are read.
        """
        objects = self._objects[resource]
        for key, stored in list(objects.items()):
            obj = change(stored.object)
            if obj != stored.object:
                objects[key] = Stored(obj, orjson.dumps(obj), stored.revision)

    def _write(self, revision: int, statement: str, values: tuple[object, ...]) -> None:
        """Execute the statement and store the new revision, in one transaction."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(statement, values)
            self._db.execute("UPDATE counter SET revision = ?", (revision,))
            self._db.execute("COMMIT")
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _tell(self, event: Event) -> None:
        self._window(event.resource).add(event)
        self.revision = event.revision
        self._index(event.resource, event.key, event.old, event.new)
        for waiter in self._waiters[event.resource]:
            waiter.set()
        for listener in self.listeners:
            listener(event)

    def _index(self, resource: str, key: Key, old: Stored | None, new: Stored | None) -> None:
        if old is not None:
            self._uids.pop(old.uid, None)
            for reference in old.metadata.get("ownerReferences", ()):
                members = self._dependents[reference["uid"]]
                members.discard((resource, key))
                if not members:
                    del self._dependents[reference["uid"]]
        if new is not None:
            self._uids[new.uid] = (resource, key)
            for reference in new.metadata.get("ownerReferences", ()):
                self._dependents[reference["uid"]].add((resource, key))

    # Events.

    def since(self, resource: str, revision: int) -> list[Event]:
        """Return the events after `revision`, oldest first. Raises Expired."""
        return self._window(resource).since(revision)

    def subscribe(self, resource: str, waiter: asyncio.Event) -> Callable[[], None]:
        """Set `waiter` on each write to the resource. Returns a function to unsubscribe."""
        self._waiters[resource].add(waiter)
        return lambda: self._waiters[resource].discard(waiter)

    def notify_all(self) -> None:
        """Notify all subscribers, for example to stop them."""
        for waiters in self._waiters.values():
            for waiter in waiters:
                waiter.set()

    def _window(self, resource: str) -> _Window:
        if resource not in self._windows:
            self._windows[resource] = _Window(self._floor)
        return self._windows[resource]


def _sorted(objects: dict[Key, Stored], namespace: str) -> list[Stored]:
    if namespace:
        return [objects[key] for key in sorted(objects) if key[0] == namespace]
    return [objects[key] for key in sorted(objects)]
