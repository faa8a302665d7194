"""``kubeai key``: API keys, which are Secrets of the Kubernetes API (kubeai/api/api_key.py).

A key is generated here and shown once; the Secret has its SHA-256, unless the key itself is to be
stored for another program that reads it.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from msgspec.structs import replace

from kubeai.api.api_key import (
    ADMIN,
    ENTRY_KEY,
    ENTRY_SHA256,
    EXPIRES,
    LABEL,
    MAX_IN_FLIGHT,
    MODELS,
    PRIORITY,
    RPM,
    SELECTOR,
    TENANT,
    TPM,
    ApiKey,
    ApiKeyError,
    KeySecret,
    age,
    digest_of,
    read_key,
    time_text,
)
from kubeai.errors import KubeAIError, quoted
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import SECRETS

# The beginning tells people and secret scanners what it is. The rest is 256 random bits.
KEY_PREFIX = "sk-kubeai-"
RANDOM_BYTES = 32
# By which Authorino finds its Secrets, besides the labels that an AuthConfig selects.
AUTHORINO = {"authorino.kuadrant.io/managed-by": "authorino"}
_UNITS_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class NewKey(msgspec.Struct, frozen=True, kw_only=True):
    """The options of ``kubeai key create``."""

    name: str
    tenant: str | None = None
    models: str | None = None
    rpm: int | None = None
    tpm: int | None = None
    max_in_flight: int | None = None
    priority: int | None = None
    expires: str | None = None  # a duration, such as 90d, or a time
    admin: bool = False
    authorino: bool = False


class ListedKey(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A row of ``kubeai key list``."""

    name: str
    state: str  # Active, Expired, Deleting or Unusable
    problem: str = ""
    tenant: str = ""
    models: str = ""
    rpm: int = 0  # 0: no limit, as below
    tpm: int = 0
    max_in_flight: int = 0
    priority: int = 0
    expires: str = ""  # empty: never
    admin: bool = False
    created: str = ""


async def create(kube: Kube, namespace: str, new: NewKey, now_s: float) -> str:
    """Create a Secret with a new key, and return the key. KubeAIError if it cannot be created."""
    key = KEY_PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    secret = secret_of(new, key, now_s)
    read_key(msgspec.convert(secret, KeySecret))  # an error here is one of the options
    try:
        await kube.create(SECRETS, secret, namespace)
    except ApiError as error:
        if error.status != 409:
            raise
        raise KubeAIError(
            f"the Secret {new.name} exists; choose another name, or revoke its key first "
            f"(kubeai key revoke {new.name})"
        ) from None
    return key


def secret_of(new: NewKey, key: str, now_s: float) -> dict[str, Any]:
    """The Secret for a key. KubeAIError if ``expires`` is invalid."""
    annotations = {
        TENANT: new.tenant,
        MODELS: new.models,
        RPM: new.rpm,
        TPM: new.tpm,
        MAX_IN_FLIGHT: new.max_in_flight,
        PRIORITY: new.priority,
        EXPIRES: None if new.expires is None else expiry(new.expires, now_s),
        ADMIN: "true" if new.admin else None,
    }
    if new.authorino:
        labels, entry = {LABEL: "true", **AUTHORINO}, {ENTRY_KEY: key}
    else:
        labels, entry = {LABEL: "true"}, {ENTRY_SHA256: digest_of(key.encode()).hex()}
    return {
        "metadata": {
            "name": new.name,
            "labels": labels,
            "annotations": {
                name: str(value) for name, value in annotations.items() if value is not None
            },
        },
        "type": "Opaque",
        "data": {name: base64.b64encode(text.encode()).decode() for name, text in entry.items()},
    }


def expiry(text: str, now_s: float) -> str:
    """The annotation for ``--expires``: a duration from now on, or a time with an offset."""
    count, unit = text[:-1], text[-1:]
    try:
        if count.isascii() and count.isdigit() and unit in _UNITS_S:
            expires_s = now_s + int(count) * _UNITS_S[unit]
        else:
            moment = datetime.fromisoformat(text)
            if moment.tzinfo is None:
                raise ValueError
            expires_s = moment.timestamp()
        written = time_text(expires_s)
    except (ValueError, OverflowError, OSError):
        raise KubeAIError(
            f"--expires: {quoted(text)} is neither a duration, such as 90d or 12h, nor a time with "
            "a UTC offset, such as 2027-01-31T00:00:00Z"
        ) from None
    if expires_s <= now_s:
        raise KubeAIError(f"--expires: {quoted(text)} is not in the future")
    return written


async def keys(kube: Kube, namespace: str, now_s: float) -> list[ListedKey]:
    """All Secrets with the label of API keys, by name. Their contents are not returned."""
    found, _ = await kube.list(SECRETS, namespace, labels=SELECTOR, type=KeySecret)
    return rows(found, now_s)


def rows(secrets: Sequence[KeySecret], now_s: float) -> list[ListedKey]:
    """What ``kubeai key list`` shows of these Secrets."""
    read: dict[str, ApiKey | str] = {}  # by name; a text says why there is no key
    holders: dict[bytes, list[KeySecret]] = defaultdict(list)
    for secret in secrets:
        try:
            key = read_key(secret)
        except ApiKeyError as error:
            read[secret.metadata.name] = str(error)
        else:
            read[secret.metadata.name] = key
            if secret.metadata.deletion_timestamp is None:
                holders[key.digest].append(secret)
    listed = []
    for secret in sorted(secrets, key=lambda each: each.metadata.name):
        key_or_problem = read[secret.metadata.name]
        if isinstance(key_or_problem, ApiKey) and secret.metadata.deletion_timestamp is None:
            oldest = min(holders[key_or_problem.digest], key=lambda each: age(each.metadata))
            if oldest is not secret:
                name = oldest.metadata.name
                key_or_problem = f"the Secret {name}, which is older, has the same key"
        listed.append(_row(secret, key_or_problem, now_s))
    return listed


def _row(secret: KeySecret, key: ApiKey | str, now_s: float) -> ListedKey:
    metadata = secret.metadata
    created = metadata.creation_timestamp
    row = ListedKey(
        name=metadata.name,
        state="Unusable",
        created="" if created is None else created.astimezone(UTC).strftime("%Y-%m-%d"),
    )
    if isinstance(key, str):
        row = replace(row, problem=key)
    else:
        row = replace(
            row,
            state="Expired" if 0 < key.expires_s <= now_s else "Active",
            tenant=key.tenant,
            models=key.models,
            rpm=key.requests_per_minute,
            tpm=key.tokens_per_minute,
            max_in_flight=key.in_flight_max,
            priority=key.priority,
            expires=time_text(key.expires_s) if key.expires_s else "",
            admin=key.is_admin,
        )
    return row if metadata.deletion_timestamp is None else replace(row, state="Deleting")


async def revoke(kube: Kube, namespace: str, name: str) -> None:
    """Delete the Secret of a key. KubeAIError if there is none, or it is no API key."""
    try:
        found = await kube.get(SECRETS, name, namespace, type=KeySecret)
        if found.metadata.labels.get(LABEL) != "true":
            raise KubeAIError(
                f"the Secret {name} is no API key: it does not have the label {LABEL}=true"
            )
        await kube.delete(SECRETS, name, namespace, uid=found.metadata.uid)
    except ApiError as error:
        if error.status != 404:
            raise
        raise KubeAIError(f"there is no Secret {quoted(name)} in the namespace {namespace}") from (
            None
        )


def now_s() -> float:
    """The wall clock."""
    return time.time()
