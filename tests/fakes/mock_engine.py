"""The mock engine served in the test's own event loop, with real clients."""

from __future__ import annotations

import asyncio
import contextlib
import json

import aiohttp
import openai
from aiohttp import web

from kubeai.mock_engine.options import parse
from kubeai.mock_engine.server import MockEngine

FAST = ("--prefill-tokens-per-second=0", "--decode-tokens-per-second=0")
HELLO = [{"role": "user", "content": "Hello there, engine"}]


class Served:
    def __init__(self, mock: MockEngine, url: str, runner: web.AppRunner) -> None:
        self.mock = mock
        self.url = url
        self.runner = runner
        self.client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        self.session = aiohttp.ClientSession(url)

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, object]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(path, data=data, headers=headers) as response:
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.text()

    async def events(self, path: str, body: dict) -> list[tuple[str, object]]:
        """The (event name, data) pairs of a stream."""
        async with self.session.post(path, json=body | {"stream": True}) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            text = await response.text()
        events = []
        for block in text.removesuffix("\n\n").split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            data = fields["data"]
            value = data if data == "[DONE]" else json.loads(data)
            events.append((fields.get("event", ""), value))
        return events


@contextlib.asynccontextmanager
async def serving(*flags: str):
    options, ignored = parse(["--model=hf://mock/m", "--served-model-name=m", *flags])
    assert not ignored
    mock = MockEngine(options, "replica-1")
    runner = web.AppRunner(mock.app(), handler_cancellation=True, shutdown_timeout=5.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    served = Served(mock, f"http://{host}:{port}", runner)
    try:
        yield served
        assert mock.engine.cache.used == 0, "a sequence was left in the engine"
        assert (mock.engine.running, mock.engine.waiting) == (0, 0)
    finally:
        await served.session.close()
        await served.client.close()
        await runner.cleanup()


async def until(check, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not check():  # noqa: ASYNC110 (the state is the engine's own)
            await asyncio.sleep(0.005)
