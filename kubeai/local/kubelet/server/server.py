"""The kubelet's HTTP server: logs and exec, for clients that :mod:`~.access` admits.

``GET /containerLogs/{namespace}/{pod}/{container}`` with the kubelet's parameters (follow,
tailLines, sinceSeconds, sinceTime, timestamps, previous, limitBytes), and ``/exec/…``, which
execs.py handles. The client is the API server.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from aiohttp import web

from kubeai.local.kubelet.runtime.logs import LogQuery, read_log
from kubeai.local.kubelet.server.access import Access
from kubeai.local.kubelet.server.execs import Containers, Execs, Refusal
from kubeai.local.sockets import REQUEST_LINE_MAX_BYTES


class Pods(Containers, Protocol):
    """The pods of this node. ``find_log`` returns a log's path and whether it may still grow."""

    def find_log(
        self, namespace: str, pod: str, container: str, previous: bool
    ) -> tuple[Path, Callable[[], bool]]:
        """Return the path of a log, and whether it may still grow. Raises Refusal."""


class KubeletServer:
    """Listens on a free port of 127.0.0.1, which ``start`` returns."""

    def __init__(self, pods: Pods, access: Access) -> None:
        self._pods = pods
        self._access = access
        app = web.Application(middlewares=[self._check])
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._log)
        execs = Execs(pods)
        for method in ("GET", "POST"):
            app.router.add_route(method, "/exec/{namespace}/{pod}/{container}", execs.handle)
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.5, max_line_size=REQUEST_LINE_MAX_BYTES
        )

    async def start(self) -> int:
        """Listen, and return the port."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._access.tls)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop listening, and end open requests."""
        await self._runner.cleanup()

    @web.middleware
    async def _check(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        if not self._access.admits(request):
            return web.Response(status=401, text="Unauthorized\n")
        try:
            return await handler(request)
        except Refusal as error:
            return web.Response(status=error.status, text=f"{error}\n")

    async def _log(self, request: web.Request) -> web.StreamResponse:
        names = request.match_info
        try:
            query, previous = _query(request), _flag(request, "previous")
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        path, alive = self._pods.find_log(
            names["namespace"], names["pod"], names["container"], previous
        )
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        await response.prepare(request)
        try:
            async for block in read_log(path, query, alive):
                await response.write(block)
            await response.write_eof()
        except ConnectionError:
            pass  # the client disconnected
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
