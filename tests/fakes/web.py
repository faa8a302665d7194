"""An aiohttp application on loopback."""

import contextlib
from collections.abc import AsyncIterator

from aiohttp import web


async def start(app: web.Application, shutdown_timeout_s: float) -> tuple[web.AppRunner, str]:
    """Its runner, which ends it, and its URL."""
    runner = web.AppRunner(app, shutdown_timeout=shutdown_timeout_s)
    return runner, f"http://{await _listen(runner)}"


@contextlib.asynccontextmanager
async def serving(runner: web.AppRunner) -> AsyncIterator[str]:
    """The address (ip:port) of an application that is served inside the block."""
    yield await _listen(runner)
    await runner.cleanup()


async def _listen(runner: web.AppRunner) -> str:
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return f"127.0.0.1:{runner.addresses[0][1]}"
