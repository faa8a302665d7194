"""A gateway for the clients in the terminal: scripted answers to chats, and a console's state."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from fakes.web import serving

STATE: dict[str, Any] = {
    "version": "1.2.3",
    "time_s": 0.0,
    "local": True,
    "namespace": "default",
    "synced": True,
    "can": {"scale": True, "apply": True, "delete": True},
    "workers": [{"worker": 0, "ready": True, "restarts": 0}],
    "models": [
        {
            "name": "chat",
            "state": "Ready",
            "reason": "",
            "message": "",
            "engine": "VLLM",
            "replicas": {"ready": 1, "desired": 2, "min": 0, "max": None},
            "in_flight": 3,
            "held": 0,
            "rates": {
                "window_s": 60,
                "requests_per_s": 1.2,
                "prompt_tokens_per_s": 800.0,
                "output_tokens_per_s": 55.0,
            },
            "ttft_s": {"window_s": 300, "count": 40, "p50": 0.2, "p99": 1.1},
        },
        {
            "name": "embed",
            "state": "Starting",
            "reason": "PullingImage",
            "message": "pulling image, 1 of 3",
            "engine": "Infinity",
            "replicas": {"ready": 0, "desired": 1, "min": 0, "max": 3},
            "in_flight": 0,
            "held": 2,
            "rates": {
                "window_s": 60,
                "requests_per_s": 0.0,
                "prompt_tokens_per_s": 0.0,
                "output_tokens_per_s": 0.0,
            },
            "ttft_s": {"window_s": 300, "count": 0, "p50": None, "p99": None},
        },
    ],
}


class FakeGateway:
    """``script``: what a chat is answered with. Text is streamed; other items are as below.

    ":…" a comment, an int: that HTTP status with an error, an Exception's text: an SSE error event,
    None: the stream stays open.
    """

    def __init__(self) -> None:
        self.script: list[Any] = ["Hello", " there"]
        self.chats: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.state: dict[str, Any] | None = STATE
        self.reached_none = asyncio.Event()
        self.origin = ""

    @property
    def base_url(self) -> str:
        return f"{self.origin}/openai/v1"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[FakeGateway]:
        app = web.Application()
        app.router.add_post("/openai/v1/chat/completions", self._chat)
        app.router.add_get("/openai/v1/models", self._models)
        app.router.add_get("/ui/api/state", self._state)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        async with serving(runner) as address:
            self.origin = f"http://{address}"
            yield self

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "chat"}, {"id": "big"}]})

    async def _state(self, _: web.Request) -> web.Response:
        if self.state is None:
            raise web.HTTPNotFound
        return web.json_response(self.state)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.chats.append(await request.json())
        self.headers.append(dict(request.headers))
        if isinstance(status := self.script[0], int):
            error = {"error": {"message": "it failed", "code": "model_not_found"}}
            return web.json_response(error, status=status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for item in self.script:
            if item is None:
                self.reached_none.set()
                await asyncio.Event().wait()
            elif isinstance(item, Exception):
                event = json.dumps({"error": {"message": str(item)}})
                await response.write(f"data: {event}\n\n".encode())
                return response
            elif item.startswith(":"):
                await response.write(f"{item}\n\n".encode())
            elif item != "cut":
                event = json.dumps({"choices": [{"delta": {"content": item}}]})
                await response.write(f"data: {event}\n\n".encode())
        if self.script[-1] != "cut":
            await response.write(b"data: [DONE]\n\n")
        return response
