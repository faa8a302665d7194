"""A proxy in front of a Kubernetes API that records writes and can cut the connection at one.

It speaks plain HTTP on loopback. Commands in containers it answers itself, by ``run``, since the
clusters of these tests have no kubelets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import ssl
import time
from collections.abc import Callable
from typing import Literal

import aiohttp
from aiohttp import web
from servers import ApiServer

from kubeai.kube.exec import ERROR, PROTOCOL_V4, STDOUT, Ending, ExecResult

CUT = Literal["before", "after"]
DROPPED_HEADERS = {"host", "content-length", "transfer-encoding", "connection"}


@dataclasses.dataclass
class Arrival:
    """A call that has come and would change something, a Lease included."""

    at_s: float  # by the monotonic clock
    call: str  # the verb, and the path below the namespaces
    status: int = 0  # of its answer, once there is one


def no_commands(pod: str, command: list[str]) -> ExecResult:
    raise AssertionError(f"a command in {pod}: {command}")


class Proxy:
    """``calls``: what changed something but for the Lease, in order; ``arrivals``: all of it.

    ``heard`` is called at each arrival, before it is passed on. ``cut(k, when)``: see there.
    """

    def __init__(
        self, api: ApiServer, run: Callable[[str, list[str]], ExecResult] = no_commands
    ) -> None:
        self._api = api
        self._run = run
        self._cut: tuple[int, CUT, Callable[[], None]] | None = None
        self.calls: list[str] = []
        self.arrivals: list[Arrival] = []
        self.heard: Callable[[Arrival], None] = lambda arrival: None
        app = web.Application(client_max_size=16 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        self.url = ""

    async def start(self, listener: socket.socket | None = None) -> None:
        """Listen on loopback, or at ``listener``."""
        tls = ssl.create_default_context(cafile=self._api.ca_file)
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls, limit=0))
        await self._runner.setup()
        listener = listener or socket.create_server(("127.0.0.1", 0))
        await web.SockSite(self._runner, listener).start()
        self.url = "http://{}:{}".format(*listener.getsockname())

    async def stop(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    def cut(self, k: int, when: CUT, kill: Callable[[], None]) -> None:
        """Call ``kill`` at the k-th change: before it reaches the API, or once it has been made.

        Its answer reaches nobody in both cases.
        """
        self._cut = k, when, kill

    def uncut(self) -> None:
        self._cut = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET" and not request.path.endswith("/exec"):
            return await self._pass_on(request)
        call = f"{request.method} {request.path.rpartition('/namespaces/')[2]}"
        arrival = Arrival(time.monotonic(), call)
        self.arrivals.append(arrival)
        self.heard(arrival)
        answer = await self._change(request, call)
        arrival.status = answer.status
        return answer

    async def _change(self, request: web.Request, call: str) -> web.StreamResponse:
        execs = request.path.endswith("/exec")
        if "/leases" in request.path:
            return await self._pass_on(request)
        self.calls.append(call)
        here = self._cut is not None and len(self.calls) == self._cut[0]
        if here and self._cut[1] == "before":
            return self._kill(request)
        answer = await (self._exec(request) if execs else self._pass_on(request, held=here))
        return self._kill(request) if here else answer

    def _kill(self, request: web.Request) -> web.StreamResponse:
        assert self._cut is not None
        self._cut[2]()
        assert request.transport is not None
        request.transport.abort()
        return web.Response(status=500)

    async def _pass_on(self, request: web.Request, held: bool = False) -> web.StreamResponse:
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() not in DROPPED_HEADERS
        }
        async with self._session.request(
            request.method,
            self._api.url + request.path_qs,
            data=await request.read() or None,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None),
        ) as answer:
            kept = {"Content-Type": answer.headers.get("Content-Type", "application/json")}
            if held:
                await answer.read()
                return web.Response(status=answer.status)
            response = web.StreamResponse(status=answer.status, headers=kept)
            with contextlib.suppress(ConnectionError):  # the operator is gone
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
            return response

    async def _exec(self, request: web.Request) -> web.StreamResponse:
        pod = request.path.split("/")[-2]
        result = self._run(pod, request.query.getall("command"))
        messages = web.WebSocketResponse(protocols=(PROTOCOL_V4,))
        with contextlib.suppress(ConnectionError):
            await messages.prepare(request)
            await messages.send_bytes(bytes([STDOUT]) + result.output.encode())
            ending = Ending(result.exit_code).encode()
            await messages.send_bytes(bytes([ERROR]) + ending)
            await messages.close()
        return messages
