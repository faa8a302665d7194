"""One connection to one peer, which receives that peer's loads.

If a peer only has ``/metrics``, such as KubeAI in Go, the active requests per Model are polled from
there every ``POLL_S``. Addresses from the config are asked for ``/metrics`` first, because they may
be any server, and for ``/loads`` only if that response has the header `wire.MARKER`. A misbehaving
peer cannot block anything else: each peer has its own task, with limits on time, size and rate.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import NamedTuple

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from kubeai.errors import KubeAIError
from kubeai.framing import FrameTooLong, read_frame
from kubeai.supervisor.peers import wire

CONNECT_TIMEOUT_S = 2.0
SILENCE_MAX_S = 3 * wire.HEARTBEAT_S
READ_INTERVAL_MIN_S = 0.01
POLL_S = 2.0
POLL_TIMEOUT_S = 2.0
METRICS_MAX_BYTES = 4 << 20
ACTIVE = "kubeai_inference_requests_active"
_TIMEOUT = aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_MAX_S)


class PeerLost(KubeAIError):
    """A peer does not respond, or not as expected."""


class OwnIdentity(KubeAIError):
    """The peer at this address is this KubeAI replica itself."""


class Report(NamedTuple):
    """A peer's report. ``whole``: complete, rather than changes since the previous one.

    ``process``: see `wire.Hello`.
    """

    loads: wire.Loads
    whole: bool
    process: str = ""


async def listen(
    session: aiohttp.ClientSession, address: str, identity: str, *, metrics_first: bool = False
) -> AsyncGenerator[Report, None]:
    """Yield the reports of the peer at ``address`` (``ip:port``), until PeerLost or BadFrame.

    Raises OwnIdentity if its identity equals ``identity``. ``metrics_first``: do not request
    ``/loads`` before the peer has announced it.
    """
    try:
        if not metrics_first:
            async with contextlib.aclosing(_subscribe(session, address, identity)) as words:
                async for word in words:
                    yield word
        async for word in _poll(session, address):
            yield word
        async with contextlib.aclosing(_subscribe(session, address, identity)) as words:
            async for word in words:
                yield word
        raise PeerLost(f"{wire.PATH} answered 404, but /metrics announces it")
    except (aiohttp.ClientError, TimeoutError, OSError, EOFError) as error:
        raise PeerLost(str(error) or type(error).__name__) from None


async def _subscribe(
    session: aiohttp.ClientSession, address: str, identity: str
) -> AsyncGenerator[Report, None]:
    """Yield reports from ``/loads``. Ends only if the peer has no such path."""
    async with session.get(f"http://{address}{wire.PATH}", timeout=_TIMEOUT) as response:
        if response.status == 200:
            async for word in _stream(response.content, identity):
                yield word
        elif response.status != 404:
            raise PeerLost(f"{wire.PATH} answered {response.status}")


async def _stream(stream: aiohttp.StreamReader, identity: str) -> AsyncGenerator[Report, None]:
    whole = True
    process = ""
    while True:
        try:
            body = await read_frame(stream, wire.FRAME_MAX_BYTES)
        except FrameTooLong as error:
            raise wire.BadFrame(str(error)) from None
        frame = wire.decode(body)
        if isinstance(frame, wire.Loads):
            yield Report(frame, whole, process)
            whole = False
        elif frame.identity == identity:
            raise OwnIdentity(identity)
        else:
            process = frame.process
        await asyncio.sleep(READ_INTERVAL_MIN_S)


async def _poll(session: aiohttp.ClientSession, address: str) -> AsyncGenerator[Report, None]:
    """Yield the active requests from ``/metrics``. Ends when the peer announces ``/loads``."""
    timeout = aiohttp.ClientTimeout(total=POLL_TIMEOUT_S)
    while True:
        async with session.get(f"http://{address}/metrics", timeout=timeout) as response:
            if response.status != 200:
                raise PeerLost(f"/metrics answered {response.status}")
            if wire.MARKER in response.headers:
                return
            text = await _text(response.content)
        yield Report(await asyncio.to_thread(read_metrics, text), whole=True)
        await asyncio.sleep(POLL_S)


async def _text(stream: aiohttp.StreamReader) -> str:
    body = bytearray()
    async for chunk in stream.iter_any():
        body += chunk
        if len(body) > METRICS_MAX_BYTES:
            raise PeerLost(f"/metrics is larger than {METRICS_MAX_BYTES} bytes")
    return body.decode(errors="replace")


def read_metrics(text: str) -> wire.Loads:
    """Read each Model's active requests from Prometheus text. BadFrame if it is invalid."""
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
