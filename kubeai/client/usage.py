"""``kubeai usage``: what API keys have used, from the ConfigMaps of the Kubernetes API."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import IO

import msgspec

from kubeai.api.usage import (
    GROUPS,
    USAGE_SELECTOR,
    KeyUsage,
    Usage,
    UsageCounts,
    stored_usage,
)
from kubeai.kube.client import Kube
from kubeai.kube.resources import CONFIGMAPS
from kubeai.logs import printable

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
_COUNTS = UsageCounts.__struct_fields__


class _ConfigMap(msgspec.Struct):
    data: dict[str, str] | None = None


async def read_usage(kube: Kube, namespace: str) -> dict[str, KeyUsage]:
    """The usage of all keys, by key. KubeAIError if an entry is malformed."""
    found, _ = await kube.list(CONFIGMAPS, namespace, labels=USAGE_SELECTOR, type=_ConfigMap)
    return stored_usage(each.data or {} for each in found)


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
