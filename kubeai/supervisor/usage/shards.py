"""Which ConfigMap has the usage of which key, and what is written to it. Pure.

The usage of a key and a Model is added to the ConfigMap that has it already. New ones go to the
first with room, so that a small installation has one ConfigMap. Several KubeAI replicas may put the
same key into different ones: readers add them up.

A write is conditional on the version that was read, and has a number by which its writer recognises
it. A writer that does not learn whether a write succeeded can so find out, and nothing is counted
twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from kubeai.api.objects import ObjectMeta
from kubeai.api.usage import (
    USAGE_LABEL,
    USAGE_NAME,
    KeyUsage,
    UsageCounts,
    decode_usage,
    encode_usage,
)
from kubeai.logs import get_logger

log = get_logger(__name__)

SHARDS_MAX = 128
# The API server accepts 1 MiB. The rest is for counts that get longer, and for metadata.
SHARD_MAX_BYTES = 512 << 10
ENTRY_BYTES = 48  # of a key, besides the names
COUNTS_BYTES = 64  # of a Model, besides its name
WRITERS = "kubeai.org/usage-writers"  # the annotation
WRITERS_MAX = 32
WRITER_AGE_MAX_S = 86_400.0


class ConfigMap(msgspec.Struct):
    """What is read of a ConfigMap."""

    metadata: ObjectMeta
    data: dict[str, str] | None = None


class Write(NamedTuple):
    """Counts that are added to a ConfigMap."""

    number: int  # of this writer's writes to it
    usage: dict[str, KeyUsage]  # by key


class _LastWrite(msgspec.Struct, array_like=True):
    number: int
    time_s: float  # Unix time


_writers_decoder = msgspec.json.Decoder(dict[str, _LastWrite])


class Shard:
    """One ConfigMap as last read or written, and the write that is under way."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.version = ""  # its resourceVersion; empty: it does not exist
        self.is_stale = False  # it may have changed: read it before the next write
        self.keys: dict[str, KeyUsage] = {}
        self.size_bytes = 0  # as estimated
        self.write: Write | None = None
        self._writers: dict[str, _LastWrite] = {}
        self._number = 0  # of the last write

    def take(self, found: ConfigMap | None) -> None:
        """Take over what was read; None: the ConfigMap does not exist."""
        self.is_stale = False
        self.keys, self.size_bytes, self._writers = {}, 0, {}
        self.version = "" if found is None else found.metadata.resource_version
        if found is None:
            return
        for key, text in (found.data or {}).items():
            self.size_bytes += len(key) + len(text)
            try:
                self.keys[key] = decode_usage(text)
            except ValueError as error:
                log.warning(
                    "usage is unreadable and starts again from 0",
                    config_map=self.name,
                    key=key,
                    error=str(error),
                )
        try:
            text = found.metadata.annotations.get(WRITERS, "{}")
            self._writers = _writers_decoder.decode(text)
        except ValueError as error:
            log.warning("unreadable annotation", config_map=self.name, error=str(error))

    def begin_write(self, usage: dict[str, KeyUsage]) -> None:
        """Start a write, which :meth:`body` describes until :meth:`wrote`."""
        self._number += 1
        self.write = Write(self._number, usage)

    def has_write(self, writer: str) -> bool:
        """Whether the write is in what was read."""
        last = self._writers.get(writer)
        return self.write is not None and last is not None and last.number >= self.write.number

    def body(self, writer: str, now_s: float) -> dict[str, Any]:
        """The patch that makes the write, or the ConfigMap to create."""
        assert self.write is not None, "begin_write was called"
        merged = self._merged(self.write.usage)
        writers = self._writers | {writer: _LastWrite(self.write.number, now_s)}
        recent = sorted(writers.items(), key=lambda each: each[1].time_s)[-WRITERS_MAX:]
        kept = {name: last for name, last in recent if now_s - last.time_s <= WRITER_AGE_MAX_S}
        return self._body(
            {key: encode_usage(usage) for key, usage in merged.items()},
            {"annotations": {WRITERS: msgspec.json.encode(kept).decode()}},
        )

    def wrote(self, version: str, writer: str, now_s: float) -> None:
        """The write has succeeded."""
        assert self.write is not None, "begin_write was called"
        for key, usage in self._merged(self.write.usage).items():
            self.keys[key] = usage
        self._writers[writer] = _LastWrite(self.write.number, now_s)
        self.write = None
        self._accepted(version)

    def forget(self, gone: dict[str, KeyUsage | None]) -> dict[str, Any]:
        """The patch that replaces the usage of keys; None removes it."""
        return self._body(
            {key: None if usage is None else encode_usage(usage) for key, usage in gone.items()},
            {},
        )

    def forgot(self, version: str, gone: dict[str, KeyUsage | None]) -> None:
        """That patch has succeeded."""
        for key, usage in gone.items():
            if usage is None:
                del self.keys[key]
            else:
                self.keys[key] = usage
        self._accepted(version)

    def _accepted(self, version: str) -> None:
        self.version = version
        self.is_stale = False
        self.size_bytes = sum(
            len(key) + len(encode_usage(usage)) for key, usage in self.keys.items()
        )

    def _merged(self, added: dict[str, KeyUsage]) -> dict[str, KeyUsage]:
        merged = {}
        for key, usage in added.items():
            merged[key] = self.keys.get(key, KeyUsage()).copy()
            merged[key].add(usage)
        return merged

    def _body(self, data: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        labels = {USAGE_LABEL: "true", "app.kubernetes.io/managed-by": "kubeai"}
        metadata: dict[str, Any] = {"labels": labels} | more
        metadata |= {"resourceVersion": self.version} if self.version else {"name": self.name}
        return {"metadata": metadata, "data": data}


class Shards:
    """All ConfigMaps with usage."""

    def __init__(self) -> None:
        self._shards: dict[str, Shard] = {}
        self._homes: dict[tuple[str, str], Shard] = {}  # by key and Model

    def __iter__(self) -> Iterator[Shard]:
        return iter(list(self._shards.values()))

    def load(self, found: Iterable[ConfigMap]) -> None:
        """Take over all ConfigMaps that exist."""
        for each in found:
            number = each.metadata.name.removeprefix(f"{USAGE_NAME}-")
            if number.isdecimal() and int(number) < SHARDS_MAX:
                shard = self._shards.setdefault(each.metadata.name, Shard(each.metadata.name))
                shard.take(each)
                self.note(shard)

    def note(self, shard: Shard) -> None:
        """What a ConfigMap has is known again, because it was read."""
        for key, usage in shard.keys.items():
            for model in usage.models:
                self._homes.setdefault((key, model), shard)

    def assign(
        self, pending: dict[str, KeyUsage]
    ) -> tuple[dict[Shard, dict[str, KeyUsage]], dict[str, KeyUsage]]:
        """Where to add counts: by ConfigMap, and what there is no room for."""
        added: dict[Shard, dict[str, KeyUsage]] = {}
        left: dict[str, KeyUsage] = {}
        for key, usage in pending.items():
            for model, counts in usage.models.items():
                shard = self._homes.get((key, model)) or self._place(key, usage.tenant, model)
                into = left if shard is None else added.setdefault(shard, {})
                into.setdefault(key, KeyUsage(usage.tenant)).models[model] = counts
        return added, left

    def _place(self, key: str, tenant: str, model: str) -> Shard | None:
        size_bytes = COUNTS_BYTES + len(model)
        key_bytes = ENTRY_BYTES + len(key) + len(tenant)
        for number in range(SHARDS_MAX):
            name = f"{USAGE_NAME}-{number}"
            shard = self._shards.get(name)
            if shard is None:
                shard = self._shards[name] = Shard(name)
            needed = size_bytes + (0 if key in shard.keys else key_bytes)
            if shard.size_bytes + needed <= SHARD_MAX_BYTES:
                shard.size_bytes += needed
                self._homes[key, model] = shard
                return shard
        return None

    def give_up(self, shard: Shard) -> dict[str, KeyUsage]:
        """End a write for which a ConfigMap has no room, and return its counts.

        Several KubeAI replicas have filled the ConfigMap at once. It has been read since, so what
        is not in it yet goes to another one.
        """
        assert shard.write is not None, "begin_write was called"
        usage, shard.write = shard.write.usage, None
        for key, each in usage.items():
            stored = shard.keys.get(key, KeyUsage()).models
            for model in each.models.keys() - stored.keys():
                self._homes.pop((key, model), None)
        return usage

    def obsolete(
        self, keys: set[str], models: set[str], before_day: str
    ) -> dict[Shard, dict[str, KeyUsage | None]]:
        """What to forget: counts of keys or Models that do not exist and were last used before a
        day (YYYY-MM-DD). By ConfigMap, the usage that is left of each key; None: nothing.
        """

        def stays(key: str, model: str, counts: UsageCounts) -> bool:
            return (key in keys and model in models) or counts.last_day >= before_day

        found: dict[Shard, dict[str, KeyUsage | None]] = {}
        for shard in self._shards.values():
            for key, usage in shard.keys.items():
                left = {m: counts for m, counts in usage.models.items() if stays(key, m, counts)}
                if len(left) < len(usage.models):
                    some = KeyUsage(usage.tenant, left) if left else None
                    found.setdefault(shard, {})[key] = some
        return found

    def forgot(self, gone: dict[str, KeyUsage | None]) -> None:
        """Counts have been forgotten: new ones may go to another ConfigMap."""
        self._homes = {
            home: shard
            for home, shard in self._homes.items()
            if home[0] not in gone
            or ((left := gone[home[0]]) is not None and home[1] in left.models)
        }
