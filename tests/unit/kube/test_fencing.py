"""A leader's writes are not sent once its fence has fallen."""

from __future__ import annotations

import asyncio

import orjson
import pytest
from fakes.scripted_api import kubeconfig, thing

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS

DEADLINE_S = 10.0


class Fallen(Exception):
    """Raised when the fence has fallen."""


class Fence:
    """Allows a number of writes, then none."""

    def __init__(self, times=0):
        self.times = times

    def __call__(self):
        self.times -= 1
        if self.times < 0:
            raise Fallen


OBJECT = {"metadata": {"name": "a"}}
WRITES = {
    "create": lambda kube: kube.create(CONFIGMAPS, OBJECT),
    "update": lambda kube: kube.update(CONFIGMAPS, OBJECT),
    "patch": lambda kube: kube.patch(CONFIGMAPS, "a", {"data": {}}),
    "delete": lambda kube: kube.delete(CONFIGMAPS, "a"),
    "exec": lambda kube: kube.exec("p", ["ls"], container="c", timeout_s=DEADLINE_S),
}


async def sent(kube, server):
    """The requests that the server got up to a read that was sent last."""
    server.answer = 200, orjson.dumps(thing("a", 1)), {}
    await kube.get(CONFIGMAPS, "a")
    *earlier, last = [request[0] for request in server.requests]
    assert last == "GET"
    return earlier


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_is_not_sent_if_its_fence_falls_while_it_waits_for_a_connection(
    kube, server, monkeypatch, write
):
    loop, fence = asyncio.get_running_loop(), Fence(100)
    connect = loop.sock_connect

    async def slowly(*args):
        await connect(*args)
        fence.times = 0

    monkeypatch.setattr(loop, "sock_connect", slowly)
    with pytest.raises(Fallen):
        await WRITES[write](kube.fenced(fence))
    assert await sent(kube, server) == []


@pytest.mark.parametrize("write", WRITES)
async def test_a_write_is_not_sent_on_an_open_connection_if_its_fence_has_fallen(
    kube, server, write
):
    fenced = kube.fenced(Fence())
    assert await sent(fenced, server) == [], "reads pass"
    with pytest.raises(Fallen):
        await WRITES[write](fenced)
    assert await sent(kube, server) == ["GET"]


async def test_a_body_is_not_sent_if_the_fence_falls_after_the_headers(kube, server):
    with pytest.raises(Fallen):
        await WRITES["patch"](kube.fenced(Fence(1)))
    assert await sent(kube, server) == []


async def test_a_write_within_its_fence_is_sent_and_a_resend_is_checked_again(server, tmp_path):
    token = tmp_path / "token"
    token.write_text("first")
    path = kubeconfig(tmp_path / "kubeconfig", server.url, {"tokenFile": str(token)})
    kube = await Kube.connect(path)
    token.write_text("second")
    server.tokens, server.answer = {"Bearer second"}, (200, orjson.dumps(OBJECT), {})
    with pytest.raises(Fallen):
        await WRITES["patch"](kube.fenced(Fence(2)))
    assert [request[0] for request in server.requests] == ["PATCH"], "rejected as unauthorized"
    await WRITES["patch"](kube.fenced(Fence(100)))
    assert [request[0] for request in server.requests] == ["PATCH", "PATCH"]
    await kube.close()


async def test_a_failed_write_within_its_fence_is_an_api_error(tmp_path):
    kube = await Kube.connect(kubeconfig(tmp_path / "nobody", "http://127.0.0.1:1", {}))
    with pytest.raises(ApiError):
        await WRITES["patch"](kube.fenced(Fence(100)))
    with pytest.raises(Fallen):  # regardless of the outcome, its caller writes no more
        await WRITES["patch"](kube.fenced(Fence()))
    await kube.close()
