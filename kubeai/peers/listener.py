"""One connection to one peer: its loads, as it tells them.

Also to one of an older kind, which has nothing but ``/metrics``: there the active requests by
Model are read every ``POLL_S``. Nothing that a peer does holds up anything else: each has its own
task, and limits on time, on size and on how often it is listened to.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from kubeai.errors import KubeAIError
from kubeai.peers import wire

CONNECT_TIMEOUT_S = 2.0
SILENCE_MAX_S = 3 * wire.HEARTBEAT_S
READ_INTERVAL_MIN_S = 0.01
POLL_S = 2.0
POLL_TIMEOUT_S = 2.0
METRICS_MAX_BYTES = 4 << 20
ACTIVE = "kubeai_inference_requests_active"
_TIMEOUT = aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_MAX_S)


class PeerLost(KubeAIError):
    """A peer does not answer, or not as it should."""


async def listen(
    session: aiohttp.ClientSession, address: str
) -> AsyncGenerator[wire.Hello | wire.Loads, None]:
    """What the replica at ``address`` (``ip:port``) says, until PeerLost."""
    try:
        async with session.get(f"http://{address}{wire.PATH}", timeout=_TIMEOUT) as response:
            if response.status == 200:
                async for frame in _frames(response.content):
                    yield frame
            elif response.status != 404:
                raise PeerLost(f"{wire.PATH} answered {response.status}")
        async for loads in _poll(session, address):
            yield loads
    except (aiohttp.ClientError, TimeoutError, OSError, EOFError) as error:
        raise PeerLost(str(error) or type(error).__name__) from None


async def _frames(stream: aiohttp.StreamReader) -> AsyncGenerator[wire.Hello | wire.Loads, None]:
    while True:
        (length,) = wire.LENGTH.unpack(await stream.readexactly(wire.LENGTH.size))
        if length > wire.FRAME_MAX_BYTES:
            raise wire.BadFrame(f"a frame of {length} bytes")
        yield wire.decode(await stream.readexactly(length))
        await asyncio.sleep(READ_INTERVAL_MIN_S)


async def _poll(session: aiohttp.ClientSession, address: str) -> AsyncGenerator[wire.Loads, None]:
    timeout = aiohttp.ClientTimeout(total=POLL_TIMEOUT_S)
    while True:
        async with session.get(f"http://{address}/metrics", timeout=timeout) as response:
            if response.status != 200:
                raise PeerLost(f"/metrics answered {response.status}")
            text = await _text(response.content)
        yield await asyncio.to_thread(read_metrics, text)
        await asyncio.sleep(POLL_S)


async def _text(stream: aiohttp.StreamReader) -> str:
    body = bytearray()
    async for chunk in stream.iter_any():
        body += chunk
        if len(body) > METRICS_MAX_BYTES:
            raise PeerLost(f"/metrics is larger than {METRICS_MAX_BYTES} bytes")
    return body.decode(errors="replace")


def read_metrics(text: str) -> wire.Loads:
    """The active requests of each Model in a page of Prometheus text; BadFrame."""
    active: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            if family.name == ACTIVE:
                for sample in family.samples:
                    model = sample.labels.get("request_model", "")
                    active[model] = active.get(model, 0.0) + sample.value
        models = {model: (int(count), 0) for model, count in active.items() if model}
    except (ValueError, OverflowError) as error:
        raise wire.BadFrame(f"/metrics: {error}") from None
    if not all(0 <= count <= wire.COUNT_MAX for count, _ in models.values()):
        raise wire.BadFrame(f"/metrics: {ACTIVE} is out of bounds")
    return wire.Loads(dict(models))
