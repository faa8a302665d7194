"""``kubeai usage``: what API keys have used, from the ConfigMaps of the Kubernetes API."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

import msgspec

from kubeai.api.usage import (
    USAGE_SELECTOR,
    KeyUsage,
    UsageCounts,
    decode_usage,
    total_usage,
)
from kubeai.errors import KubeAIError
from kubeai.kube.client import Kube
from kubeai.kube.resources import CONFIGMAPS
from kubeai.logs import printable

GROUPS = ("key", "tenant", "model")
_HEADINGS = {
    "key": "KEY",
    "tenant": "TENANT",
    "model": "MODEL",
    "requests": "REQUESTS",
    "estimated_requests": "ESTIMATED",
    "prompt_tokens": "PROMPT",
    "cached_tokens": "CACHED",
    "completion_tokens": "COMPLETION",
    "last_day": "LAST USED",
}
_COUNTS = tuple(_HEADINGS)[len(GROUPS) :]


class _ConfigMap(msgspec.Struct):
    data: dict[str, str] | None = None


class Usage(msgspec.Struct):
    """The usage of a group of keys and Models: names of the group, and its sums."""

    names: dict[str, str]  # of "key", "tenant" and "model", those that all in the group share
    counts: UsageCounts

    def row(self) -> dict[str, str | int]:
        """The names and the counts, in the order of the columns."""
        values = zip(_COUNTS, msgspec.structs.astuple(self.counts), strict=True)
        return {**self.names, **dict(values)}


async def read_usage(kube: Kube, namespace: str) -> dict[str, KeyUsage]:
    """The usage of all keys, by key. KubeAIError if an entry is malformed."""
    found, _ = await kube.list(CONFIGMAPS, namespace, labels=USAGE_SELECTOR, type=_ConfigMap)
    return total_usage(_entries(found))


def _entries(found: Iterable[_ConfigMap]) -> Iterable[tuple[str, KeyUsage]]:
    for each in found:
        for key, text in (each.data or {}).items():
            try:
                yield key, decode_usage(text)
            except ValueError as error:
                raise KubeAIError(
                    f"the stored usage of the key {key} is malformed ({error}); remove its entry "
                    f"from the ConfigMap, see kubectl get configmaps -l {USAGE_SELECTOR}"
                ) from None


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


def write_json(usages: Sequence[Usage], out: IO[str]) -> None:
    """Write a list of objects."""
    text = msgspec.json.encode([usage.row() for usage in usages])
    out.write(msgspec.json.format(text, indent=2).decode() + "\n")


def write_csv(usages: Sequence[Usage], by: str, out: IO[str]) -> None:
    """Write RFC 4180's CSV, with a line of headings."""
    writer = csv.DictWriter(out, [*names_of(by), *_COUNTS])
    writer.writeheader()
    writer.writerows(usage.row() for usage in usages)


def write_table(usages: Sequence[Usage], by: str, out: IO[str]) -> None:
    """Write a table for people."""
    columns = [*names_of(by), *_COUNTS]
    rows = [[_HEADINGS[column] for column in columns]]
    for usage in usages:
        row = usage.row()
        rows.append([_cell(row[column]) for column in columns])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        aligned = [
            cell.rjust(width) if column in _COUNTS[:-1] else cell.ljust(width)
            for column, cell, width in zip(columns, cells, widths, strict=True)
        ]
        out.write("  ".join(aligned).rstrip() + "\n")


def names_of(by: str) -> tuple[str, ...]:
    """The names that a group has."""
    return {"": GROUPS, "key": ("key", "tenant")}.get(by, (by,))


def _cell(value: str | int) -> str:
    return f"{value:,}" if isinstance(value, int) else printable(value)
