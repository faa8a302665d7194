"""The kubelet's HTTP server: logs, on loopback, for who knows the API's token.

``GET /containerLogs/{namespace}/{pod}/{container}`` with the kubelet's own parameters (follow,
tailLines, sinceSeconds, sinceTime, timestamps, previous, limitBytes). The API's process is the
client.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from aiohttp import web

from kubeai.local.kubelet.logs import LogQuery, read_log


class NoLog(Exception):
    """There is no such log; ``status`` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Logs(Protocol):
    """Where a container's log is, and whether it still grows; NoLog where there is none."""

    def find_log(
        self, namespace: str, pod: str, container: str, previous: bool
    ) -> tuple[Path, Callable[[], bool]]: ...


class LogServer:
    """Listens on a port of 127.0.0.1; ``start`` returns it."""

    def __init__(self, logs: Logs, token: str) -> None:
        self._logs = logs
        self._token = token.encode()
        app = web.Application()
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._get)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)

    async def start(self) -> int:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _get(self, request: web.Request) -> web.StreamResponse:
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(sent, self._token):
            return web.Response(status=401, text="Unauthorized\n")
        names = request.match_info
        try:
            query = _query(request)
            previous = _flag(request, "previous")
            path, alive = self._logs.find_log(
                names["namespace"], names["pod"], names["container"], previous
            )
        except ValueError as error:
            return web.Response(status=400, text=f"{error}\n")
        except NoLog as error:
            return web.Response(status=error.status, text=f"{error}\n")
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        try:
            async for block in read_log(path, query, alive):
                await response.write(block)
            await response.write_eof()
        except ConnectionError:
            pass  # the reader left
        return response


def _query(request: web.Request) -> LogQuery:
    since = ""
    if (seconds := _number(request, "sinceSeconds")) is not None:
        since = _log_time(datetime.fromtimestamp(time.time(), UTC) - timedelta(seconds=seconds))
    elif text := request.query.get("sinceTime"):
        since = _log_time(datetime.fromisoformat(text).astimezone(UTC))
    return LogQuery(
        follow=_flag(request, "follow"),
        tail_lines=_number(request, "tailLines"),
        since=since,
        timestamps=_flag(request, "timestamps"),
        limit_bytes=_number(request, "limitBytes"),
    )


def _log_time(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%S.%f")


def _flag(request: web.Request, name: str) -> bool:
    return request.query.get(name, "").lower() in ("true", "1")


def _number(request: web.Request, name: str) -> int | None:
    text = request.query.get(name)
    if text is None or text == "":
        return None
    if not text.isdecimal():
        raise ValueError(f"{name}: {text!r} is not a number")
    return min(int(text), 10**12) if name == "limitBytes" else min(int(text), 10**9)
