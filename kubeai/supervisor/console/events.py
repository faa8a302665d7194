"""The console's event stream: the state and the last requests, to all that look.

While there is a stream, :class:`Hub` reads the state once a second. A stream that cannot keep up
skips states, and requests that :class:`Traffic` no longer keeps. Nothing is queued.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from aiohttp import web

from kubeai.logs import get_logger
from kubeai.openai.errors import ErrorResponse
from kubeai.supervisor.console.state import State
from kubeai.supervisor.console.traffic import Traffic

log = get_logger(__name__)

STREAMS_MAX = 32
TICK_S = 1.0
HEARTBEAT_S = 15.0


class Hub:
    """See the module. ``read_state`` is called in each tick; it also reads ``traffic``."""

    def __init__(
        self,
        read_state: Callable[[], Coroutine[Any, Any, State]],
        traffic: Traffic,
        *,
        tick_s: float = TICK_S,
    ) -> None:
        self._read_state = read_state
        self._traffic = traffic
        self._tick_s = tick_s
        self._streams = 0
        self._ticker: asyncio.Task[None] | None = None
        self._ticked = asyncio.Event()  # replaced in each tick
        self._closed = False
        self._state = b""  # as of the last tick; empty before the first one
        self._compared = b""  # the last state without its time
        self._version = 0  # of the state

    async def close(self) -> None:
        """End all streams."""
        self._closed = True
        self._wake()
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Serve one stream until the client leaves."""
        if self._closed:
            raise ErrorResponse("KubeAI is stopping.", status=503)
        if self._streams >= STREAMS_MAX:
            raise ErrorResponse(f"More than {STREAMS_MAX} clients follow the state.", status=503)
        self._streams += 1
        try:
            if self._ticker is None:
                self._state = self._compared = b""
                self._ticker = asyncio.get_running_loop().create_task(self._run())
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            await self._send(response)
            return response
        finally:
            self._streams -= 1

    async def _send(self, response: web.StreamResponse) -> None:
        loop = asyncio.get_running_loop()
        version, requests_n, sent_s = -1, -1, loop.time()
        while not self._closed:
            text = b""
            ticked = self._ticked
            if self._state and version != self._version:
                text += b"event: state\ndata: %b\n\n" % self._state
                version = self._version
            if self._state and requests_n != self._traffic.count:
                new = msgspec.json.encode(self._traffic.newest(max(0, requests_n)))
                text += b"event: requests\ndata: %b\n\n" % new
                requests_n = self._traffic.count
            if not text and loop.time() - sent_s >= HEARTBEAT_S:
                text = b": heartbeat\n\n"
            if text:
                await response.write(text)
                sent_s = loop.time()
            await ticked.wait()

    async def _run(self) -> None:
        """Tick while there are streams."""
        while self._streams:
            try:
                await self._tick()
            except Exception:
                log.exception("cannot read the state for the console")
            await asyncio.sleep(self._tick_s)
        self._ticker = None

    async def _tick(self) -> None:
        state = await self._read_state()
        # Also if nothing else has changed: a new stream begins with the present time.
        self._state = msgspec.json.encode(state)
        compared = msgspec.json.encode(msgspec.structs.replace(state, time_s=0.0))
        if compared != self._compared:
            self._compared = compared
            self._version += 1
        self._wake()

    def _wake(self) -> None:
        ticked, self._ticked = self._ticked, asyncio.Event()
        ticked.set()
