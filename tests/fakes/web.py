"""An aiohttp application on loopback."""

from aiohttp import web


async def start(app: web.Application, shutdown_timeout_s: float) -> tuple[web.AppRunner, str]:
    """Its runner, which ends it, and its URL."""
    runner = web.AppRunner(app, shutdown_timeout=shutdown_timeout_s)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return runner, f"http://127.0.0.1:{runner.addresses[0][1]}"
