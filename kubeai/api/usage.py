"""What API keys have used, as it is stored in ConfigMaps. Pure.

A ConfigMap with the label :data:`USAGE_LABEL` has one entry per key, named as the key's Secret. It
is JSON with the tenant and, for each Model, a :class:`UsageCounts` as a list. A key may have
entries in several of these ConfigMaps; its usage is their sum. Written by supervisor/usage,
read by ``kubeai usage`` and the console.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from kubeai.errors import KubeAIError

USAGE_LABEL = "kubeai.org/usage"
USAGE_SELECTOR = f"{USAGE_LABEL}=true"
USAGE_NAME = "kubeai-usage"  # of the ConfigMaps, with a number
GROUPS = ("key", "tenant", "model")  # by which usage can be added up


class UsageCounts(msgspec.Struct, array_like=True):
    """Requests that have ended, with one key and to one Model, and their tokens."""

    requests: int = 0
    estimated_requests: int = 0  # those whose tokens the engine has not reported
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt tokens
    completion_tokens: int = 0
    last_day: str = ""  # of the last request, UTC: YYYY-MM-DD

    def add(self, other: UsageCounts) -> None:
        """Add other counts."""
        self.requests += other.requests
        self.estimated_requests += other.estimated_requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.last_day = max(self.last_day, other.last_day)

    def copy(self) -> UsageCounts:
        """The same counts, which change independently."""
        return UsageCounts(*msgspec.structs.astuple(self))


class KeyUsage(msgspec.Struct):
    """What one key has used, by Model."""

    tenant: str = ""  # of its last request
    models: dict[str, UsageCounts] = {}

    def add(self, other: KeyUsage) -> None:
        """Add another usage of this key, which is later than this one."""
        self.tenant = other.tenant
        for model, counts in other.models.items():
            self.counts_of(model).add(counts)

    def counts_of(self, model: str) -> UsageCounts:
        """The counts of a Model, which are changed by the caller."""
        counts = self.models.get(model)
        if counts is None:
            counts = self.models[model] = UsageCounts()
        return counts

    def copy(self) -> KeyUsage:
        """The same usage, which changes independently."""
        return KeyUsage(self.tenant, {name: each.copy() for name, each in self.models.items()})


_decoder = msgspec.json.Decoder(KeyUsage)


def encode_usage(usage: KeyUsage) -> str:
    """The value of a ConfigMap's entry."""
    return msgspec.json.encode(usage).decode()


def decode_usage(text: str) -> KeyUsage:
    """The usage in a ConfigMap's entry. ValueError if it is malformed."""
    return _decoder.decode(text)  # its error is a ValueError


def total_usage(entries: Iterable[tuple[str, KeyUsage]]) -> dict[str, KeyUsage]:
    """The usage by key, of entries of all ConfigMaps. The tenant is that of the latest request."""
    total: dict[str, KeyUsage] = {}
    latest: dict[str, str] = {}
    for key, usage in entries:
        sum_ = total.setdefault(key, KeyUsage())
        day = max((counts.last_day for counts in usage.models.values()), default="")
        tenant = usage.tenant if day >= latest.get(key, "") else sum_.tenant
        latest[key] = max(day, latest.get(key, ""))
        sum_.add(usage)
        sum_.tenant = tenant
    return total


def stored_usage(data: Iterable[Mapping[str, str]]) -> dict[str, KeyUsage]:
    """The usage of all keys, by key. ``data``: of the ConfigMaps.

    KubeAIError if an entry is malformed.
    """
    return total_usage(_entries(data))


def _entries(data: Iterable[Mapping[str, str]]) -> Iterable[tuple[str, KeyUsage]]:
    for each in data:
        for key, text in each.items():
            try:
                yield key, decode_usage(text)
            except ValueError as error:
                raise KubeAIError(
                    f"the stored usage of the key {key} is malformed ({error}); remove its entry "
                    f"from the ConfigMap, see kubectl get configmaps -l {USAGE_SELECTOR}"
                ) from None


class Usage(msgspec.Struct):
    """The usage of a group of keys and Models: names of the group, and its sums."""

    names: dict[str, str]  # of "key", "tenant" and "model", those that all in the group share
    counts: UsageCounts

    def row(self) -> dict[str, str | int]:
        """The names and the counts, in the order of the columns."""
        values = zip(
            UsageCounts.__struct_fields__, msgspec.structs.astuple(self.counts), strict=True
        )
        return {**self.names, **dict(values)}


def grouped(total: Mapping[str, KeyUsage], by: str) -> list[Usage]:
    """The usage by one of GROUPS, or by key and Model (""); sorted by name."""
    groups: dict[tuple[str, ...], Usage] = {}
    for key, usage in total.items():
        for model, counts in usage.models.items():
            names = {"key": key, "tenant": usage.tenant, "model": model}
            if by == "key":
                del names["model"]
            elif by:
                names = {by: names[by]}
            group = groups.setdefault(tuple(names.values()), Usage(names, UsageCounts()))
            group.counts.add(counts)
    return [groups[names] for names in sorted(groups)]
