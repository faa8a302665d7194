"""A worker's API keys: which there are, and how often a client may send a wrong one.

:class:`Keys` applies the supervisor's messages to the dictionary in which requests find their keys
(``FastPathContext.keys``), marks keys that are revoked, and limits failures by client address. The
compiled side is ``_credentials.pyx``. Created by context.py if keys are required; otherwise nothing
here is used.

A worker starts without keys and serves only once it has received them, so every failure to
distribute them rejects requests. Limits: ``FAILING_ADDRESSES_MAX_COUNT`` addresses are remembered,
the latest ones.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address
from typing import Protocol

from kubeai._keys import Key
from kubeai.gateway._credentials import Problem, check, forget
from kubeai.gateway.denials import (
    COOKIE,
    AuditLog,
    admin_required,
    no_valid_key,
    too_many_failures,
)
from kubeai.gateway.event_counts import EventCounter
from kubeai.openai.errors import ErrorResponse
from kubeai.routing.keys import KeyDelta, KeyRecord, KeySnapshot

HEALTH_PATHS = frozenset(("/healthz", "/readyz"))  # for GET and HEAD, without a key
FAILING_ADDRESSES_MAX_COUNT = 10_000
IPV6_PREFIX_BITS = 64  # what one client has at its disposal


class Keys:
    """See the module. ``by_digest`` is the context's dictionary, and stays the same object."""

    def __init__(
        self, by_digest: dict[bytes, Key], failures_per_minute: int, events: EventCounter
    ) -> None:
        """``failures_per_minute``: of a client address; 0: no limit. ``events``: for metrics."""
        self.by_digest = by_digest
        self.by_name: dict[str, Key] = {}
        self.audit = AuditLog(events)
        self.failures = FailureLimit(failures_per_minute)

    def apply(self, message: KeySnapshot | KeyDelta) -> bool:
        """Apply a change. Returns whether keys were revoked, or are no longer an administrator's.

        Requests that have them must then be ended.
        """
        if isinstance(message, KeyDelta):
            return self._set(message.name, message.key)
        records = {record.name: record for record in message.keys}
        gone = [name for name in self.by_name if name not in records]
        changes = [(name, None) for name in gone] + list(records.items())
        lost = [self._set(name, record) for name, record in changes]
        return any(lost)

    def _set(self, name: str, record: KeyRecord | None) -> bool:
        """Set or remove the key of a Secret. Returns what :meth:`apply` does."""
        old = self.by_name.pop(name, None)
        was_admin = old is not None and old.is_admin
        if old is not None and record is not None and old.update(record):
            self.by_name[name] = old
            return was_admin and not old.is_admin
        is_revoked = old is not None and (record is None or record.digest != old.digest)
        if old is not None:
            # Another Secret may have the same key: then it is the other's entry.
            if self.by_digest.get(old.digest) is old:
                del self.by_digest[old.digest]
            old.is_revoked = is_revoked
            forget(old)
        if record is not None:
            key = Key(record)
            if (other := self.by_digest.get(key.digest)) is not None:  # of another Secret
                forget(other)
            self.by_name[name] = self.by_digest[key.digest] = key
        return is_revoked

    def rejection(self, problem: int, sources: int, address: str) -> ErrorResponse:
        """The error for a request without a valid key; counts it if the key was wrong.

        ``problem``, ``sources``: of ``_credentials``.
        """
        if problem not in (Problem.MISSING, Problem.NOT_BEARER):
            wait_s = self.failures.take(address)
            if wait_s:
                return too_many_failures(math.ceil(wait_s), self.failures.per_minute)
        return no_valid_key(problem, sources)


class _Context(Protocol):
    @property
    def key_table(self) -> Keys | None: ...


def check_credential(
    context: _Context,
    credential: bytes,
    address: str,
    *,
    request_id: str | None = None,
    method: str = "POST",
    path: str = "/ui/login",
) -> Key:
    """The administrator's key with a text that a client has sent elsewhere than in a header.

    ErrorResponse if it is not one, which is logged, and a wrong key counted for the client's
    address.
    """
    keys = context.key_table
    assert keys is not None, "keys are required"
    key, problem = check(keys.by_digest, credential)
    if key is None or problem != Problem.NO_PROBLEM:
        error = keys.rejection(problem, COOKIE, address)
    elif key.is_admin:
        return key
    else:
        error = admin_required()
    keys.audit.note(
        error, client=address, method=method, target=path, request_id=request_id, key=key
    )
    raise error


class FailureLimit:
    """Token buckets by client address. IPv6 addresses count by their /64."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # latest use last

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str) -> float:
        """Count a failure. Returns the seconds until the next one is allowed; 0: this one was."""
        if not self.per_minute:
            return 0.0
        now_s, per_s = self._clock(), self.per_minute / 60
        client = _network(address)
        left, at_s = self._buckets.pop(client, (float(self.per_minute), now_s))
        left = min(float(self.per_minute), left + (now_s - at_s) * per_s)
        is_allowed = left >= 1
        self._buckets[client] = (left - is_allowed, now_s)
        if len(self._buckets) > FAILING_ADDRESSES_MAX_COUNT:
            self._buckets.popitem(last=False)
        return 0.0 if is_allowed else (1 - left) / per_s


def _network(address: str) -> str:
    """What one client has of the address space; an address that is not one counts as it is."""
    if ":" not in address:
        return address
    try:
        parsed = IPv6Address(address)
    except ValueError:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return f"{int(parsed) >> (128 - IPV6_PREFIX_BITS):x}/{IPV6_PREFIX_BITS}"
