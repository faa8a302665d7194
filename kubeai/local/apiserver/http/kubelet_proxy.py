"""Proxies ``pods/<name>/log`` and ``pods/<name>/exec`` to the kubelet of the pod's node.

A log is streamed as it arrives. An exec's WebSocket is bridged message by message, in the client's
protocol. Errors from the kubelet are returned to the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
from aiohttp import web

from kubeai.kube.exec import Ending
from kubeai.local.apiserver import errors
from kubeai.local.apiserver.errors import StatusError
from kubeai.local.apiserver.kinds.resources import BUILT_IN, PODS
from kubeai.local.apiserver.storage.registry import Registry
from kubeai.local.sockets import (
    CLOSE_TIMEOUT_S,
    MESSAGE_MAX_BYTES,
    asked_protocol,
    first_of,
    payload,
    ping,
    server_socket,
)

Object = dict[str, Any]

CONNECT_TIMEOUT_S = 5.0
SILENCE_MAX_S = 60.0  # between bytes of a log that is not followed
CHUNK_MAX_BYTES = 64 << 10
_NODES = next(resource for resource in BUILT_IN if resource.key == "nodes")
# Query parameters for exec streams: (API name, kubelet name).
_STREAMS = (("stdin", "input"), ("stdout", "output"), ("stderr", "error"), ("tty", "tty"))
_PASSED_ON = (
    "follow", "tailLines", "sinceSeconds", "sinceTime", "timestamps", "previous", "limitBytes",
)  # fmt: skip


class KubeletProxy:
    """A client of the kubelets. Authenticates with the same token that API clients use."""

    def __init__(self, registry: Registry, token: str) -> None:
        self._registry = registry
        self._headers = {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close the connections to the kubelets."""
        if self._session is not None:
            await self._session.close()

    async def log(self, request: web.Request, namespace: str, name: str) -> web.StreamResponse:
        """Answer ``GET pods/<name>/log`` with the kubelet's response."""
        pod = self._registry.get(PODS, namespace, name).object
        container = _container(pod, request.query.get("container", ""))
        url = f"{self._kubelet(pod)}/containerLogs/{namespace}/{name}/{container}"
        query = {key: request.query[key] for key in _PASSED_ON if key in request.query}
        follows = query.get("follow") == "true"
        timeout = aiohttp.ClientTimeout(
            total=None,
            sock_connect=CONNECT_TIMEOUT_S,
            sock_read=None if follows else SILENCE_MAX_S,
        )
        with _unreachable(pod):
            async with self._client().get(
                url, params=query, headers=self._headers, timeout=timeout
            ) as response:
                return await _copy(request, response)

    async def exec(self, request: web.Request, namespace: str, name: str) -> web.StreamResponse:
        """Relay the messages of ``pods/<name>/exec`` to and from the kubelet."""
        pod = self._registry.get(PODS, namespace, name).object
        container = _container(pod, request.query.get("container", ""))
        url = f"{self._kubelet(pod)}/exec/{namespace}/{name}/{container}"
        query = [("command", word) for word in request.query.getall("command", ())]
        for ours, theirs in _STREAMS:
            if request.query.get(ours, "").lower() in ("true", "1"):
                query.append((theirs, "1"))
        protocol = asked_protocol(request)
        with _unreachable(pod):
            if not protocol:  # the kubelet refuses this too, with the better error message
                async with self._client().get(url, params=query, headers=self._headers) as response:
                    raise await _refusal(response)
            kubelet = await self._client().ws_connect(
                url,
                params=query,
                headers=self._headers,
                protocols=(protocol,),
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S),
                max_msg_size=MESSAGE_MAX_BYTES,
            )
        try:
            client = server_socket(protocol)
            await client.prepare(request)
            await first_of(
                [
                    asyncio.create_task(_pass_on(client, kubelet)),
                    asyncio.create_task(_pass_on(kubelet, client)),
                    asyncio.create_task(ping(client)),
                ]
            )
            await client.close()
        finally:
            await kubelet.close()
        return client

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(raise_for_status=_raise_refused_upgrade)
        return self._session

    def _kubelet(self, pod: Object) -> str:
        name, node_name = pod["metadata"]["name"], pod["spec"].get("nodeName")
        if not node_name:
            raise errors.bad_request(f"pod {name} does not have a host assigned")
        status = self._registry.get(_NODES, "", node_name).object.get("status", {})
        port = (status.get("daemonEndpoints") or {}).get("kubeletEndpoint", {}).get("Port")
        for address in status.get("addresses") or ():
            if address.get("type") == "InternalIP" and port:
                return f"http://{address['address']}:{port}"
        raise errors.bad_request(f"node {node_name} reports no kubelet address")


def _container(pod: Object, requested: str) -> str:
    spec, name = pod["spec"], pod["metadata"]["name"]
    names = [container["name"] for container in spec["containers"]]
    initial = [container["name"] for container in spec.get("initContainers") or ()]
    if requested:
        if requested not in (*names, *initial):
            raise errors.bad_request(f"container {requested} is not valid for pod {name}")
        return requested
    if len(names) == 1:
        return str(names[0])
    choice = f"[{' '.join(names)}]"
    more = f" or one of the init containers: [{' '.join(initial)}]" if initial else ""
    raise errors.bad_request(
        f"a container name must be specified for pod {name}, choose one of: {choice}{more}"
    )


@contextmanager
def _unreachable(pod: Object) -> Iterator[None]:
    """Turn connection errors to the kubelet into a 502. A client disconnect is re-raised."""
    try:
        yield
    except (aiohttp.ClientConnectionError, aiohttp.WSServerHandshakeError, TimeoutError) as error:
        if isinstance(error, ConnectionResetError):
            raise
        node = pod["spec"]["nodeName"]
        message = f"the kubelet of node {node} is unreachable: {error}"
        raise StatusError(502, "BadGateway", message) from None


async def _raise_refused_upgrade(response: aiohttp.ClientResponse) -> None:
    """Raise the kubelet's error for a refused upgrade, which aiohttp's own error omits."""
    if response.status >= 400 and "Upgrade" in response.request_info.headers:
        raise await _refusal(response)


async def _refusal(response: aiohttp.ClientResponse) -> StatusError:
    body = await response.content.read(CHUNK_MAX_BYTES)
    if response.content_type == "application/json":
        ending = Ending.decode(body)
        return StatusError(ending.status, ending.reason, ending.message)
    text = body.decode(errors="replace").strip() or f"the kubelet returned {response.status}"
    return StatusError(
        response.status, "NotFound" if response.status == 404 else "BadRequest", text
    )


async def _copy(request: web.Request, source: aiohttp.ClientResponse) -> web.StreamResponse:
    if source.status != 200:
        raise await _refusal(source)
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    await response.prepare(request)
    async for chunk in source.content.iter_any():
        await response.write(chunk)
    await response.write_eof()
    return response


_Socket = web.WebSocketResponse | aiohttp.ClientWebSocketResponse


async def _pass_on(source: _Socket, target: _Socket) -> None:
    """Copy messages until the source is closed."""
    async for message in source:
        data = payload(message)
        if data is not None:
            await target.send_bytes(data)
