"""The log of received requests, which lets tests prove that none arrived twice."""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

from aiohttp import web

REQUESTS_MAX = 10_000


class RequestLog:
    """A log of received requests, so that tests can prove that none arrived twice."""

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()  # by path
        self.answered: Counter[int] = Counter()  # by status
        self.aborted = 0  # the client disconnected or the connection broke
        self.total = 0
        self._last: deque[dict[str, str]] = deque(maxlen=REQUESTS_MAX)

    def add(self, request: web.Request) -> None:
        """Count a request when it arrives."""
        self.total += 1
        resource = request.match_info.route.resource
        path = "other" if resource is None else resource.canonical  # bounds the number of entries
        self.received[path] += 1
        self._last.append({"id": request.headers.get("X-Request-Id", ""), "path": path})

    def report(self) -> dict[str, Any]:
        """The JSON body of ``GET /mock/requests``."""
        return {
            "total": self.total,
            "received": dict(self.received),
            "answered": {str(status): number for status, number in self.answered.items()},
            "aborted": self.aborted,
            "requests": list(self._last),
            "forgotten": self.total - len(self._last),
        }
