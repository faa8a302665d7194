"""``GET pods/<name>/log``: fetched from the kubelet of the pod's node, as it comes."""

from __future__ import annotations

from typing import Any

import aiohttp
from aiohttp import web

from kubeai.local.apiserver import status as errors
from kubeai.local.apiserver.registry import Registry
from kubeai.local.apiserver.resources import BUILT_IN, PODS
from kubeai.local.apiserver.status import StatusError

Object = dict[str, Any]

CONNECT_TIMEOUT_S = 5.0
SILENCE_MAX_S = 60.0  # between bytes of a log that is not followed
CHUNK_MAX_BYTES = 64 << 10
_NODES = next(resource for resource in BUILT_IN if resource.key == "nodes")
_PASSED_ON = (
    "follow", "tailLines", "sinceSeconds", "sinceTime", "timestamps", "previous", "limitBytes",
)  # fmt: skip


class PodLogs:
    """Reads logs from kubelets; the token is the one that clients show to the API."""

    def __init__(self, registry: Registry, token: str) -> None:
        self._registry = registry
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def stream(self, request: web.Request, namespace: str, name: str) -> web.StreamResponse:
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
        if self._session is None:
            self._session = aiohttp.ClientSession()
        headers = {"Authorization": f"Bearer {self._token}"}
        try:
            async with self._session.get(
                url, params=query, headers=headers, timeout=timeout
            ) as answer:
                return await _copy(request, answer)
        except (aiohttp.ClientConnectionError, TimeoutError) as error:
            if isinstance(error, ConnectionResetError):
                raise
            node = pod["spec"]["nodeName"]
            message = f"the kubelet of node {node} does not answer: {error}"
            raise StatusError(502, "BadGateway", message) from None

    def _kubelet(self, pod: Object) -> str:
        name, node_name = pod["metadata"]["name"], pod["spec"].get("nodeName")
        if not node_name:
            raise errors.bad_request(f"pod {name} does not have a host assigned")
        status = self._registry.get(_NODES, "", node_name).object.get("status", {})
        port = (status.get("daemonEndpoints") or {}).get("kubeletEndpoint", {}).get("Port")
        for address in status.get("addresses") or ():
            if address.get("type") == "InternalIP" and port:
                return f"http://{address['address']}:{port}"
        raise errors.bad_request(f"node {node_name} does not say where its kubelet is")


def _container(pod: Object, asked: str) -> str:
    spec, name = pod["spec"], pod["metadata"]["name"]
    names = [container["name"] for container in spec["containers"]]
    initial = [container["name"] for container in spec.get("initContainers") or ()]
    if asked:
        if asked not in (*names, *initial):
            raise errors.bad_request(f"container {asked} is not valid for pod {name}")
        return asked
    if len(names) == 1:
        return str(names[0])
    choice = f"[{' '.join(names)}]"
    more = f" or one of the init containers: [{' '.join(initial)}]" if initial else ""
    raise errors.bad_request(
        f"a container name must be specified for pod {name}, choose one of: {choice}{more}"
    )


async def _copy(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    if answer.status != 200:
        text = (await answer.content.read(CHUNK_MAX_BYTES)).decode(errors="replace").strip()
        reason = "NotFound" if answer.status == 404 else "BadRequest"
        raise StatusError(answer.status, reason, text or f"the kubelet said {answer.status}")
    response = web.StreamResponse(headers={"Content-Type": "text/plain"})
    await response.prepare(request)
    async for chunk in answer.content.iter_any():
        await response.write(chunk)
    await response.write_eof()
    return response
