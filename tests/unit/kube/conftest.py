"""A scripted API server, and a client of it."""

from __future__ import annotations

import pytest
from aiohttp import web
from fakes.scripted_api import ScriptedApi, kubeconfig
from fakes.web import start

from kubeai.kube.client import Kube


@pytest.fixture
async def server():
    server = ScriptedApi()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner, server.url = await start(app, shutdown_timeout_s=0.1)
    yield server
    server.done.set()
    await runner.cleanup()


@pytest.fixture
async def kube(server, tmp_path):
    kube = await Kube.connect(kubeconfig(tmp_path / "kubeconfig", server.url, {"token": "secret"}))
    yield kube
    await kube.close()
