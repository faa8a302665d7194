"""API keys as Secrets: what a Secret with the label ``kubeai.org/api-key: "true"`` says. Pure.

A Secret has the key itself in the entry ``api_key``, as Authorino's Secrets do, or its SHA-256 in
the entry ``sha256``, and its rights and limits in annotations. :func:`read_key` fails closed: a
Secret with anything that is not understood, such as a misspelt limit, has no key. Neither the
result nor an error contains the key. Used by the operator, which watches the Secrets, and by
``kubeai key``, which writes them.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from typing import TypeVar

import msgspec

from kubeai.api.labels import label_selector
from kubeai.api.objects import ObjectMeta
from kubeai.errors import KubeAIError, quoted

T = TypeVar("T")

LABEL = "kubeai.org/api-key"
SELECTOR = f"{LABEL}=true"
ENTRY_KEY, ENTRY_SHA256 = "api_key", "sha256"

PREFIX = "kubeai.org/"
TENANT = PREFIX + "tenant"
MODELS = PREFIX + "models"
RPM = PREFIX + "rpm"
TPM = PREFIX + "tpm"
MAX_IN_FLIGHT = PREFIX + "max-in-flight"
PRIORITY = PREFIX + "priority"
EXPIRES = PREFIX + "expires"
ADMIN = PREFIX + "admin"
ANNOTATIONS = TENANT, MODELS, RPM, TPM, MAX_IN_FLIGHT, PRIORITY, EXPIRES, ADMIN

KEY_MAX_BYTES = 512
TENANT_MAX_CHARS = 128
LIMIT_MAX = 1_000_000_000  # per minute, or in flight
PRIORITY_MIN, PRIORITY_MAX = -1000, 1000
PROBLEMS_MAX_COUNT = 10  # unknown annotations that are reported
_EARLIEST = datetime.min.replace(tzinfo=UTC)
_DIGITS = re.compile(r"[0-9]{1,10}")
_SIGNED = re.compile(r"-?[0-9]{1,4}")
_KEY = re.compile(rb"[!-~]+")  # what every client can send in a header
_SHA256 = re.compile(rb"[0-9A-Fa-f]{64}")
# RFC 3339, as Kubernetes writes times. The offset is required: times without one are ambiguous.
_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})"
)


class ApiKeyError(KubeAIError):
    """A Secret has no usable key. The message names each entry and annotation that is wrong."""


class KeySecret(msgspec.Struct, frozen=True, rename="camel"):
    """What is read of a Secret. Not to be kept: it may contain the key."""

    metadata: ObjectMeta
    data: dict[str, str | None] | None = None  # base64
    api_version: str = "v1"
    kind: str = "Secret"


class ApiKey(msgspec.Struct, frozen=True):
    """A key's rights and limits. 0: no limit. See :class:`kubeai.routing.keys.KeyRecord`."""

    name: str  # of the Secret
    digest: bytes  # SHA-256 of the key
    tenant: str
    models: str = ""  # a label selector; empty: all
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    in_flight_max: int = 0
    priority: int = 0
    expires_s: float = 0.0  # Unix time; 0: never
    is_admin: bool = False


def read_key(secret: KeySecret) -> ApiKey:
    """The key of a Secret. ApiKeyError lists everything that is wrong with it.

    Without the annotation ``kubeai.org/tenant``, the key is a tenant of its own, with the name of
    the Secret.
    """
    name, annotations = secret.metadata.name, secret.metadata.annotations
    problems = list(islice(_unknown(annotations), PROBLEMS_MAX_COUNT))

    def read(annotation: str, parse: Callable[[str], T], absent: T) -> T:
        text = annotations.get(annotation)
        if text is None:
            return absent
        try:
            return parse(text)
        except ValueError as error:
            problems.append(f"annotation {annotation}: {error}")
            return absent

    digest = b""
    try:
        digest = _digest(secret.data or {})
    except ValueError as error:
        problems.insert(0, str(error))
    key = ApiKey(
        name=name,
        digest=digest,
        tenant=read(TENANT, _tenant, name),
        models=read(MODELS, _selector, ""),
        requests_per_minute=read(RPM, _limit, 0),
        tokens_per_minute=read(TPM, _limit, 0),
        in_flight_max=read(MAX_IN_FLIGHT, _limit, 0),
        priority=read(PRIORITY, _priority, 0),
        expires_s=read(EXPIRES, _time, 0.0),
        is_admin=read(ADMIN, _flag, False),
    )
    if problems:
        raise ApiKeyError("; ".join(problems))
    return key


def age(metadata: ObjectMeta) -> tuple[datetime, str]:
    """Sorts the older of two Secrets first: of several with the same key, the oldest has it."""
    return metadata.creation_timestamp or _EARLIEST, metadata.name


def digest_of(key: bytes) -> bytes:
    """The SHA-256 of a key, by which it is found."""
    return hashlib.sha256(key).digest()


# Of an empty text, and of the empty line that `echo "$KEY"` writes without a key.
_NO_KEYS = frozenset(map(digest_of, (b"", b"\n")))


def time_text(time_s: float) -> str:
    """A Unix time as the annotation ``kubeai.org/expires`` has it."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _digest(data: Mapping[str, str | None]) -> bytes:
    """From the entries of a Secret. ValueError, without their contents."""
    given = [entry for entry in (ENTRY_KEY, ENTRY_SHA256) if data.get(entry)]
    if not given:
        raise ValueError(f"it has neither the entry {ENTRY_KEY} nor {ENTRY_SHA256}")
    digests = {_PARSERS[entry](_entry(data, entry)) for entry in given}
    if len(digests) > 1:
        raise ValueError(f"entry {ENTRY_SHA256}: is not the SHA-256 of the entry {ENTRY_KEY}")
    return digests.pop()


def _entry(data: Mapping[str, str | None], entry: str) -> bytes:
    try:
        return base64.b64decode(data[entry] or "", validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"entry {entry}: is not base64") from None


def _digest_of_key(key: bytes) -> bytes:
    if len(key) > KEY_MAX_BYTES:
        raise ValueError(f"entry {ENTRY_KEY}: is longer than {KEY_MAX_BYTES} bytes")
    if key.strip() != key:
        raise ValueError(
            f"entry {ENTRY_KEY}: begins or ends with white space, which no client can send; "
            "create it without a newline (printf, or --from-literal)"
        )
    if not _KEY.fullmatch(key):
        raise ValueError(
            f"entry {ENTRY_KEY}: has characters besides the visible ones of ASCII, which clients "
            "cannot send in a header"
        )
    return digest_of(key)


def _digest_of_sha256(text: bytes) -> bytes:
    text = text.strip()  # sha256sum ends its line with a newline
    if not _SHA256.fullmatch(text):
        raise ValueError(
            f"entry {ENTRY_SHA256}: is not 64 hexadecimal digits; compute it with "
            "`printf %s \"$KEY\" | sha256sum | cut -d' ' -f1`"
        )
    digest = bytes.fromhex(text.decode())
    if digest in _NO_KEYS:
        raise ValueError(
            f"entry {ENTRY_SHA256}: is the SHA-256 of an empty key; was the variable with the key "
            "set when it was computed?"
        )
    return digest


_PARSERS = {ENTRY_KEY: _digest_of_key, ENTRY_SHA256: _digest_of_sha256}


def _unknown(annotations: Mapping[str, str]) -> Iterator[str]:
    """Problems with annotations of ours that do not exist: a misspelt limit would be no limit."""
    for name in annotations:
        if name.startswith(PREFIX) and name not in ANNOTATIONS:
            import difflib  # every worker imports this module, and none reads a Secret

            similar = difflib.get_close_matches(name, ANNOTATIONS, 1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            yield f"annotation {quoted(name)[1:-1]}: is unknown{hint}"


def _tenant(text: str) -> str:
    if not text or text != text.strip() or not text.isprintable() or len(text) > TENANT_MAX_CHARS:
        raise ValueError(
            f"{quoted(text)} is not a name of 1 to {TENANT_MAX_CHARS} printable characters without "
            "spaces at its ends"
        )
    return text


def _selector(text: str) -> str:
    """Empty is an error: it would select every Model, which its author may not have meant."""
    if not text.strip():
        raise ValueError("is empty; remove it to allow all Models")
    try:
        label_selector(text)
    except ValueError as error:
        raise ValueError(f"{quoted(text)} is not a label selector: {error}") from None
    return text


def _limit(text: str) -> int:
    if not _DIGITS.fullmatch(text) or not 1 <= int(text) <= LIMIT_MAX:
        raise ValueError(
            f"{quoted(text)} is not an integer from 1 to {LIMIT_MAX}; remove it for no limit"
        )
    return int(text)


def _priority(text: str) -> int:
    if not _SIGNED.fullmatch(text) or not PRIORITY_MIN <= int(text) <= PRIORITY_MAX:
        raise ValueError(f"{quoted(text)} is not an integer from {PRIORITY_MIN} to {PRIORITY_MAX}")
    return int(text)


def _time(text: str) -> float:
    try:
        if not _TIME.fullmatch(text):
            raise ValueError
        time_s = datetime.fromisoformat(text).timestamp()
        time_text(time_s)  # in UTC, it may be in the year 10000
    except (ValueError, OverflowError):
        time_s = 0.0
    if time_s <= 0:
        raise ValueError(
            f"{quoted(text)} is not a time with a UTC offset, such as 2027-01-31T00:00:00Z"
        )
    return time_s


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{quoted(text)} is not true or false")
    return text == "true"
