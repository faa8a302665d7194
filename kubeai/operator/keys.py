"""The API keys of the namespace: Secrets with the label ``kubeai.org/api-key: "true"``.

:class:`KeyWatch` watches them, and decides which have a key. Of several Secrets with the same key,
the oldest has it, and the others have none until it is gone. A Secret that is not usable, or is
being deleted, has no key either. Every KubeAI replica watches, because each has workers that
check keys; only the leader writes Events about unusable Secrets, and all log them.

Keys themselves are not kept, only their digests. While the API cannot be reached, keys stay as they
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from kubeai.api.api_key import SELECTOR, ApiKey, ApiKeyError, KeySecret, age, read_key
from kubeai.api.objects import ObjectMeta
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import SECRETS
from kubeai.logs import get_logger

log = get_logger(__name__)

UNUSABLE, DUPLICATE = "UnusableAPIKey", "DuplicateAPIKey"  # reasons of Events


class Known(msgspec.Struct, frozen=True):
    """What is kept of a Secret: nothing that reveals its key."""

    metadata: ObjectMeta  # without annotations, of which kubectl's may contain the key
    key: ApiKey | None  # None: `problem` says why
    problem: str = ""
    api_version: str = "v1"
    kind: str = "Secret"


class Emit(Protocol):
    """Writes an Event about a Secret, if this KubeAI replica leads. See :meth:`Events.emit`."""

    def __call__(self, subject: Known, reason: str, message: str, *, warning: bool) -> None:
        """Queue the Event."""
        ...


class KeyWatch:
    """Follows the Secrets. ``publish(name, key)`` is called for each change of a Secret's key.

    When several change at once, those that lose their key are published first.
    """

    def __init__(
        self,
        publish: Callable[[str, ApiKey | None], None],
        emit: Emit,
        listed: Callable[[], None] = lambda: None,
    ) -> None:
        """``listed``: called whenever all Secrets have been listed. None of them may block."""
        self.listed = False
        self._publish = publish
        self._emit = emit
        self._on_listed = listed
        self._secrets: dict[str, Known] = {}
        self._holders: dict[bytes, set[str]] = {}  # digest → names of valid Secrets with it
        self._published: dict[str, ApiKey] = {}
        self._problems: dict[str, tuple[str, str]] = {}  # name → reason and message, as reported
        self._failing = False

    async def run(self, kube: Kube, namespace: str) -> None:
        """List and watch until cancelled."""
        await kube.follow(
            SECRETS,
            namespace,
            labels=SELECTOR,
            type=KeySecret,
            replaced=self.replace,
            changed=self.changed,
            failed=self._failed,
        )

    def replace(self, secrets: Iterable[KeySecret]) -> None:
        """Replace all Secrets with a complete list."""
        given = {secret.metadata.name: secret for secret in secrets}
        self._failing = False
        for name in self._secrets.keys() - given.keys():
            self._set(name, None)
        for name, secret in given.items():
            if not self._is_known(secret.metadata):
                self._set(name, _known(secret))
        if not self.listed:
            log.info("API keys listed", keys=len(self._published), unusable=len(self._problems))
        self.listed = True
        self._on_listed()

    def changed(self, kind: str, secret: KeySecret) -> None:
        """Apply one watch event."""
        self._failing = False
        self._set(secret.metadata.name, None if kind == "DELETED" else _known(secret))

    def report(self) -> None:
        """Emit the Events about all unusable Secrets; for a KubeAI replica that begins to lead."""
        for name, (reason, message) in self._problems.items():
            self._emit(self._secrets[name], reason, message, warning=True)

    # -- implementation --------------------------------------------------------------------------

    def _is_known(self, metadata: ObjectMeta) -> bool:
        """Whether this version has been seen: a new list mostly has those of the last one."""
        known = self._secrets.get(metadata.name)
        return (
            known is not None
            and metadata.resource_version != ""
            and known.metadata.resource_version == metadata.resource_version
            and known.metadata.uid == metadata.uid
        )

    def _set(self, name: str, new: Known | None) -> None:
        old = self._secrets.pop(name, None)
        if old is not None and new is not None and old.metadata.uid != new.metadata.uid:
            self._secrets[name] = old
            self._set(name, None)  # deleted and created again: a new key, with counts of its own
            old = None
        if new is not None:
            self._secrets[name] = new
        affected = {name}
        for digest in {known.key.digest for known in (old, new) if known and known.key}:
            holders = self._holders.setdefault(digest, set())
            affected |= holders
            if new is not None and new.key is not None and new.key.digest == digest:
                holders.add(name)
            else:
                holders.discard(name)
            if not holders:
                del self._holders[digest]
        self._settle(affected)

    def _settle(self, names: Iterable[str]) -> None:
        """Publish and report what has changed for these Secrets: lost keys, changes, new keys."""
        oldest: dict[bytes, str] = {}
        verdicts = {name: self._verdict(name, oldest) for name in names}

        def order(name: str) -> tuple[bool, bool]:
            return verdicts[name][0] is not None, name not in self._published

        for name in sorted(verdicts, key=order):
            key, reason, message = verdicts[name]
            before = self._published.get(name)
            if key != before:
                if key is None:
                    del self._published[name]
                else:
                    self._published[name] = key
                self._publish(name, key)
                if self.listed:
                    change = "removed" if key is None else "added" if before is None else "changed"
                    log.info("API key updated", secret=name, change=change)
            self._note(name, reason, message)

    def _verdict(self, name: str, oldest: dict[bytes, str]) -> tuple[ApiKey | None, str, str]:
        """A Secret's key; or None, and a reason and a message unless it is simply gone.

        ``oldest``: the names of the oldest Secrets by digest, as far as they are known; extended.
        """
        known = self._secrets.get(name)
        if known is None:
            return None, "", ""
        if known.key is None:
            return None, UNUSABLE if known.problem else "", known.problem
        digest = known.key.digest
        if digest not in oldest:
            holders = self._holders[digest]
            oldest[digest] = min(holders, key=lambda each: age(self._secrets[each].metadata))
        if oldest[digest] != name:
            return None, DUPLICATE, f"the Secret {oldest[digest]}, which is older, has the same key"
        return known.key, "", ""

    def _note(self, name: str, reason: str, message: str) -> None:
        if not reason:
            self._problems.pop(name, None)
        elif self._problems.get(name) != (reason, message):
            self._problems[name] = reason, message
            log.warning("Secret has no usable API key", secret=name, reason=reason, error=message)
            self._emit(self._secrets[name], reason, message, warning=True)

    def _failed(self, error: ApiError) -> None:
        if error.status == 403 and not self._failing:
            self._failing = True  # once, not for each attempt
            log.error(
                "cannot watch API keys",
                message="gateway.keys.required needs the permission to list and watch Secrets; "
                "the chart grants it if the value gateway.keys.required is true",
                error=str(error),
            )


def _known(secret: KeySecret) -> Known:
    """What is kept of a Secret. While it is being deleted, it has no key."""
    given = secret.metadata
    metadata = ObjectMeta(
        name=given.name,
        namespace=given.namespace,
        uid=given.uid,
        resource_version=given.resource_version,
        creation_timestamp=given.creation_timestamp,
    )
    if given.deletion_timestamp is not None:
        return Known(metadata, None)
    try:
        return Known(metadata, read_key(secret))
    except ApiKeyError as error:
        return Known(metadata, None, str(error))
