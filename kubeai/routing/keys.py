"""An API key as the data plane sees it, and the messages that distribute it to the workers.

Only digests are distributed: no worker learns a key that no client has sent it. A worker gets a
:class:`KeySnapshot` after its first routes, then one :class:`KeyDelta` per change. Versions are
those of the routing table: routes and keys share one sequence, so a worker that has acknowledged
version v has applied every change of both up to v.
"""

from __future__ import annotations

import msgspec

from kubeai.api.api_key import PRIORITY_MAX as PRIORITY_MAX
from kubeai.api.api_key import PRIORITY_MIN as PRIORITY_MIN


class KeyRecord(msgspec.Struct, frozen=True, array_like=True):
    """One valid key. Limits hold for all KubeAI replicas together; 0: no limit."""

    name: str  # of the Secret
    digest: bytes  # SHA-256 of the key
    tenant: str
    models: str = ""  # a label selector for the Models that the key may use; empty: all
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    in_flight_max: int = 0
    priority: int = 0  # PRIORITY_MIN to PRIORITY_MAX; requests with a higher one are served first
    expires_s: float = 0.0  # Unix time; 0: never
    is_admin: bool = False  # may see and use the console
    row: int = -1  # in the key table; assigned by the publisher
    generation: int = 0


class KeySnapshot(msgspec.Struct, frozen=True, tag="keys", array_like=True):
    """All keys, sent when a worker starts."""

    version: int
    keys: tuple[KeyRecord, ...]


class KeyDelta(msgspec.Struct, frozen=True, tag="key", array_like=True):
    """One Secret's new key, or None if it has none any more."""

    version: int
    name: str
    key: KeyRecord | None
