"""What the console shows of the usage of API keys: what all replicas of KubeAI have stored."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import msgspec

from kubeai.api.usage import GROUPS, USAGE_SELECTOR, Usage, UsageCounts, grouped, stored_usage
from kubeai.errors import KubeAIError, quoted
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS
from kubeai.openai.errors import ErrorResponse
from kubeai.supervisor.console.actions import refusal

ROWS_MAX_COUNT = 1000  # those with the most tokens; there may be 100,000


class UsageTable(msgspec.Struct):
    """Usage by key and Model, or by one of GROUPS."""

    rows: list[dict[str, str | int]]  # the names of the group, and the fields of UsageCounts
    count: int  # of all rows
    total: dict[str, str | int]  # of all rows: the fields of UsageCounts


class _ConfigMap(msgspec.Struct):
    data: dict[str, str] | None = None


async def read_table(kube: Kube, namespace: str, by: str) -> UsageTable:
    """The usage by one of GROUPS, or by key and Model (""). ErrorResponse if it cannot be read."""
    if by not in ("", *GROUPS):
        raise ErrorResponse(f"by: {quoted(by)} is not one of {', '.join(GROUPS)}", status=422)
    try:
        found, _ = await kube.list(CONFIGMAPS, namespace, labels=USAGE_SELECTOR, type=_ConfigMap)
    except ApiError as error:
        raise refusal(error) from error
    try:
        return await asyncio.to_thread(table_of, [each.data or {} for each in found], by)
    except KubeAIError as error:
        raise ErrorResponse(str(error), status=500) from None


def table_of(data: Iterable[Mapping[str, str]], by: str) -> UsageTable:
    """The usage in ConfigMaps with these data, by one of GROUPS or by key and Model ("")."""
    usages = grouped(stored_usage(data), by)
    total = Usage({}, UsageCounts())
    for usage in usages:
        total.counts.add(usage.counts)
    usages.sort(key=lambda usage: _tokens(usage.counts), reverse=True)
    shown = usages[:ROWS_MAX_COUNT]
    return UsageTable([usage.row() for usage in shown], len(usages), total.row())


def _tokens(counts: UsageCounts) -> tuple[int, int]:
    return counts.prompt_tokens + counts.completion_tokens, counts.requests
