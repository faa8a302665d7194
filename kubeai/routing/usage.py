"""What API keys use, as workers report it to the supervisor.

A report has what has been counted since the last one, so each request is reported once. A worker
that is killed loses at most ``USAGE_INTERVAL_MAX_S`` of counts.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

USAGE_INTERVAL_S = 1.0
# After a report with many rows, the next one comes later: 10,000 take 50 ms of CPU.
USAGE_INTERVAL_MAX_S = 10.0
USAGE_ROWS_PER_S = 1000


class UsageRow(NamedTuple):
    """Requests that have ended, with one API key and to one Model, and their tokens."""

    key: str  # the Secret's name
    tenant: str
    model: str  # the one that answered
    requests: int
    estimated_requests: int  # those whose tokens the engine has not reported
    prompt_tokens: int
    cached_tokens: int  # of the prompt tokens
    completion_tokens: int


class UsageReport(msgspec.Struct, frozen=True, tag="usage", array_like=True):
    """A worker's counts since its last report."""

    rows: tuple[UsageRow, ...]
