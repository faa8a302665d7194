"""The HTTP server on top of the registry: authentication and routing.

Listens on loopback over TLS. A request needs the token, a Host header that names loopback (so that
no web page can reach this API by DNS rebinding), and no Origin other than this API's own. Errors
are a metav1.Status. Responses are JSON, even for clients that send protobuf.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import ssl
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote

from aiohttp import web

from kubeai.errors import KubeAIError
from kubeai.local.apiserver import errors
from kubeai.local.apiserver.apply.patch import APPLY
from kubeai.local.apiserver.credentials import LOOPBACK
from kubeai.local.apiserver.errors import StatusError
from kubeai.local.apiserver.http import discovery, openapi_v2, requests
from kubeai.local.apiserver.http.kubelet_proxy import KubeletProxy
from kubeai.local.apiserver.http.requests import JSON, JSON_RANGES, PARTIAL
from kubeai.local.apiserver.http.responses import (
    event_encoder,
    json_response,
    list_response,
    object_response,
    raw_response,
)
from kubeai.local.apiserver.kinds.resources import Resource
from kubeai.local.apiserver.storage import watching
from kubeai.local.apiserver.storage.registry import Registry
from kubeai.local.apiserver.storage.watching import ListOptions
from kubeai.local.sockets import REQUEST_LINE_MAX_BYTES
from kubeai.logs import get_logger
from kubeai.port_owners import port_owner

log = get_logger(__name__)
Object = dict[str, Any]

BODY_MAX_BYTES = 3 << 20
WATCHES_MAX = 2000
SHUTDOWN_TIMEOUT_S = 2.0
KEEP_ALIVE_S = 180.0  # longer than any client keeps idle connections, so that clients close them
_OPEN_PATHS = ("/healthz", "/livez", "/readyz")


class RequestInfo(NamedTuple):
    """The resource, object and subresource that a path refers to."""

    resource: Resource
    namespace: str
    name: str
    subresource: str


class Server:
    """Serves the API on one address from `start` until `stop`."""

    def __init__(self, registry: Registry, token: str) -> None:
        self._registry = registry
        self._authorization = f"Bearer {token}".encode()
        self._kubelet_proxy = KubeletProxy(registry, token)
        self._hosts: set[str] = set()
        self._watches = 0
        self._stopping = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def start(self, ports: Sequence[int], tls: ssl.SSLContext) -> int:
        """Listen on 127.0.0.1, on the first free port of `ports` (0: any). Returns the port.

        KubeAIError if none is free.
        """
        app = web.Application(client_max_size=BODY_MAX_BYTES)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            keepalive_timeout=KEEP_ALIVE_S,
            max_line_size=REQUEST_LINE_MAX_BYTES,
        )
        await self._runner.setup()
        for index, port in enumerate(ports):
            try:
                await web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=tls).start()
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                if index == len(ports) - 1:
                    raise _in_use(port) from None
        port = int(self._runner.addresses[0][1])
        self._hosts = {f"[{h}]:{port}" if ":" in h else f"{h}:{port}" for h in LOOPBACK}
        return port

    async def stop(self) -> None:
        """End the watches, then stop listening."""
        self._stopping.set()
        self._registry.store.notify_all()
        if self._runner is not None:
            await self._runner.cleanup()
        await self._kubelet_proxy.close()

    # One request.

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            self._check_client(request)
            return await self._route(request)
        except StatusError as error:
            return json_response(error.body(), error.code)
        except web.HTTPRequestEntityTooLarge:
            return json_response(errors.too_large(BODY_MAX_BYTES).body(), 413)
        except (ConnectionResetError, asyncio.CancelledError):
            raise
        except Exception as failure:
            log.exception("request failed", method=request.method, path=request.path)
            message = f"Internal error occurred: {type(failure).__name__}: {failure}"
            return json_response(StatusError(500, "InternalError", message).body(), 500)

    def _check_client(self, request: web.Request) -> None:
        host = request.headers.get("Host", "")
        if host not in self._hosts:
            raise StatusError(403, "Forbidden", "the Host header does not name this API")
        origins = request.headers.getall("Origin", [])
        if any(origin not in _own_origins(host) for origin in origins):
            raise StatusError(403, "Forbidden", "the Origin header names another origin")
        if request.path in _OPEN_PATHS:
            return
        given = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, self._authorization):
            raise StatusError(401, "Unauthorized", "Unauthorized")

    async def _route(self, request: web.Request) -> web.StreamResponse:
        # Split before unquoting, so that an escaped slash stays part of its name.
        parts = [unquote(part) for part in request.rel_url.raw_path.split("/") if part]
        if not parts:
            return json_response(
                {"paths": ["/api", "/apis", "/healthz", "/openapi/v3", "/version"]}
            )
        if parts[0] in ("api", "apis"):
            depth = 2 if parts[0] == "api" else 3
            if len(parts) <= depth:
                return self._discovery(request, parts)
            group = "" if parts[0] == "api" else parts[1]
            return await self._resource(request, group, parts[depth - 1], parts[depth:])
        if request.method not in ("GET", "HEAD"):
            raise errors.method_not_allowed()
        if "/" + parts[0] in _OPEN_PATHS:
            return web.Response(text="ok")
        if parts == ["version"]:
            requests.check_accepts_json(request)
            return json_response(discovery.version())
        if parts[0] == "openapi":
            return self._openapi(request, parts[1:])
        raise errors.no_such_path()

    # Discovery.

    def _discovery(self, request: web.Request, parts: list[str]) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            raise errors.method_not_allowed()
        requests.check_accepts_json(request)
        catalog = self._registry.catalog
        if len(parts) == 1:
            version = requests.wants_aggregated(request)
            if version:
                document = discovery.aggregated(catalog, parts[0] == "api", version)
                kind = f"{JSON};g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList"
                return json_response(document, content_type=kind)
            if parts[0] == "api":
                return json_response(discovery.api_versions())
            return json_response(discovery.group_list(catalog))
        group = "" if parts[0] == "api" else parts[1]
        served = {resource.version for resource in catalog.of_group(group)}
        if parts[0] == "apis" and len(parts) == 2 and served:
            return json_response(discovery.group(catalog, group))
        if parts[-1] in served and len(parts) == (2 if parts[0] == "api" else 3):
            return json_response(discovery.resource_list(catalog, group, parts[-1]))
        raise errors.no_such_path()

    def _openapi(self, request: web.Request, parts: list[str]) -> web.Response:
        catalog = self._registry.catalog
        if parts == ["v2"]:
            return self._openapi_v2(request)
        requests.check_accepts_json(request)
        if parts == ["v3"]:
            return json_response(discovery.openapi_index(catalog))
        document = None
        if parts[:2] == ["v3", "api"] and len(parts) == 3:
            document = discovery.openapi_v3(catalog, "", parts[2])
        elif parts[:2] == ["v3", "apis"] and len(parts) == 4:
            document = discovery.openapi_v3(catalog, parts[2], parts[3])
        if document is None:
            raise errors.no_such_path()
        return raw_response(request, document)

    def _openapi_v2(self, request: web.Request) -> web.Response:
        catalog = self._registry.catalog
        for kind, _ in requests.accepts(request):
            if kind in (openapi_v2.PROTOBUF, openapi_v2.PROTOBUF_DEPRECATED):
                document = openapi_v2.as_protobuf(catalog)
                return web.Response(body=document, headers={"Content-Type": openapi_v2.PROTOBUF})
            if kind in JSON_RANGES:
                return raw_response(request, openapi_v2.as_json(catalog))
        raise errors.not_acceptable((JSON, openapi_v2.PROTOBUF))

    # Resources.

    async def _resource(
        self, request: web.Request, group: str, version: str, parts: list[str]
    ) -> web.StreamResponse:
        if request.method == "POST" and (group, parts) in _REVIEWS:
            return await self._review(request, group, version, parts[0])
        info = self._request_info(group, version, parts)
        method = request.method
        if info.subresource not in _STREAMS:
            requests.form(request, PARTIAL)  # reject an unsupported form before writing anything
        if info.subresource:
            return await self._subresource(request, info)
        if info.name:
            if method in ("GET", "HEAD"):
                stored = self._registry.get(info.resource, info.namespace, info.name)
                return object_response(request, info.resource, stored)
            if method in ("PUT", "PATCH"):
                return await self._write(request, info)
            if method == "DELETE":
                return await self._delete(request, info)
        else:
            if method in ("GET", "HEAD"):
                return await self._list_or_watch(request, info)
            if method == "POST":
                return await self._create(request, info)
            if method == "DELETE":
                return await self._delete_collection(request, info)
        raise errors.method_not_allowed()

    def _request_info(self, group: str, version: str, parts: list[str]) -> RequestInfo:
        namespace = ""
        if (
            parts[0] == "namespaces"
            and len(parts) > 2
            and not (len(parts) == 3 and parts[2] in ("status", "finalize"))
        ):
            namespace, parts = parts[1], parts[2:]
        resource = self._registry.catalog.find(group, version, parts[0])
        if resource is None or len(parts) > 3 or (namespace and not resource.namespaced):
            raise errors.no_such_path()
        name, subresource = (*parts[1:], "", "")[:2]
        if name and resource.namespaced and not namespace:
            raise errors.no_such_path()
        if subresource and subresource not in resource.subresources:
            raise errors.no_such_path()
        return RequestInfo(resource, namespace, name, subresource)

    async def _subresource(self, request: web.Request, info: RequestInfo) -> web.StreamResponse:
        resource, namespace, name, subresource = info
        method = request.method
        if subresource == "log" and method == "GET":
            return await self._kubelet_proxy.log(request, namespace, name)
        if subresource == "exec" and method in ("GET", "POST"):
            return await self._kubelet_proxy.exec(request, namespace, name)
        if subresource == "binding" and method == "POST":
            options = requests.write_options(request)
            self._registry.bind(
                namespace, name, await requests.read_body(request, options), options
            )
            return json_response(errors.created(), 201)
        if subresource == "scale":
            return await self._scale(request, info)
        if subresource == "status":
            if method == "GET":
                return object_response(
                    request, resource, self._registry.get(resource, namespace, name)
                )
            if method in ("PUT", "PATCH"):
                return await self._write(request, info)
        raise errors.method_not_allowed()

    async def _scale(self, request: web.Request, info: RequestInfo) -> web.Response:
        resource, namespace, name, _ = info
        registry = self._registry
        if request.method == "GET":
            return json_response(registry.scale(resource, namespace, name))
        options = requests.write_options(request)
        if request.method == "PUT":
            scale = await requests.read_body(request, options)
            return json_response(registry.set_scale(resource, namespace, name, scale, options))
        if request.method == "PATCH" and request.content_type == APPLY:
            scale = await requests.read_body(request, options)
            return json_response(registry.apply_scale(resource, namespace, name, scale, options))
        if request.method == "PATCH":
            patch = await requests.read_body(request, options, anything=True)
            scale = registry.patch_scale(
                resource, namespace, name, request.content_type, patch, options
            )
            return json_response(scale)
        raise errors.method_not_allowed()

    async def _create(self, request: web.Request, info: RequestInfo) -> web.Response:
        options = requests.write_options(request)
        obj = await requests.read_body(request, options)
        stored = self._registry.create(info.resource, info.namespace, obj, options)
        return object_response(request, info.resource, stored, 201, options.warnings)

    async def _write(self, request: web.Request, info: RequestInfo) -> web.Response:
        resource, namespace, name, subresource = info
        options, kind, made = requests.write_options(request), request.content_type, False
        registry = self._registry
        if request.method == "PUT":
            obj = await requests.read_body(request, options)
            stored = registry.update(resource, namespace, name, obj, options, subresource)
        elif kind == APPLY:
            config = await requests.read_body(request, options)
            stored, made = registry.apply(resource, namespace, name, config, options, subresource)
        else:
            patch = await requests.read_body(request, options, anything=True)
            stored = registry.patch(resource, namespace, name, kind, patch, options, subresource)
        return object_response(request, resource, stored, 201 if made else 200, options.warnings)

    async def _delete(self, request: web.Request, info: RequestInfo) -> web.Response:
        resource, namespace, name, _ = info
        options = await requests.delete_options(request)
        stored, gone = self._registry.delete(resource, namespace, name, options)
        if not gone:
            return object_response(request, resource, stored)
        return json_response(errors.success(name, resource.group, resource.plural, stored.uid))

    async def _delete_collection(self, request: web.Request, info: RequestInfo) -> web.Response:
        resource = info.resource
        options = await requests.delete_options(request)
        page = watching.list_page(
            self._registry.store,
            resource,
            requests.list_options(request, info.resource, info.namespace),
        )
        for index, stored in enumerate(page.items):
            metadata = stored.metadata
            self._registry.delete(
                resource, metadata.get("namespace", ""), metadata["name"], options
            )
            if index % 100 == 99:
                await asyncio.sleep(0)
        return list_response(request, resource, page)

    async def _review(
        self, request: web.Request, group: str, version: str, plural: str
    ) -> web.Response:
        """Answer an access review: every client with the token may do everything."""
        review = await requests.read_body(request)
        if plural == "selfsubjectaccessreviews":
            review |= {"kind": "SelfSubjectAccessReview", "status": {"allowed": True}}
        else:
            user: Object = {
                "username": "kubeai",
                "groups": ["system:masters", "system:authenticated"],
            }
            review |= {"kind": "SelfSubjectReview", "status": {"userInfo": user}}
        return json_response({**review, "apiVersion": f"{group}/{version}"}, 201)

    # Lists and watches.

    async def _list_or_watch(self, request: web.Request, info: RequestInfo) -> web.StreamResponse:
        options = requests.list_options(request, info.resource, info.namespace)
        if request.query.get("watch", "").lower() in ("1", "true", "t"):
            return await self._watch(request, info.resource, options)
        page = watching.list_page(self._registry.store, info.resource, options)
        return list_response(request, info.resource, page)

    async def _watch(
        self, request: web.Request, resource: Resource, options: ListOptions
    ) -> web.StreamResponse:
        if self._watches >= WATCHES_MAX:
            raise StatusError(429, "TooManyRequests", f"the limit is {WATCHES_MAX} watches")
        watching.check_start(self._registry.store, options)
        encode = event_encoder(request, resource)
        response = web.StreamResponse(headers={"Content-Type": JSON, "Cache-Control": "no-cache"})
        await response.prepare(request)
        self._watches += 1
        events = watching.watch(self._registry.store, resource, options, self._stopping)
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    await response.write(encode(event))
            await response.write_eof()
        except ConnectionError:
            pass  # the client is gone
        finally:
            self._watches -= 1
        return response


def _in_use(port: int) -> KubeAIError:
    owner = port_owner(port)
    return KubeAIError(
        f"--api-port: cannot listen on 127.0.0.1:{port}: address already in use"
        f"{' by ' if owner else ''}{owner}; choose another port (0: any free one)"
    )


def _own_origins(host: str) -> tuple[str, ...]:
    """Return the origins to accept: non-browser clients send that of the server they connect to.

    Older releases of Python's websocket-client send http even over TLS. That is safe on 127.0.0.1,
    where no other program can serve pages from this port, but not on ::1 (localhost).
    """
    secure = f"https://{host}"
    return (secure, f"http://{host}") if host.startswith("127.0.0.1:") else (secure,)


_STREAMS = ("exec", "log")  # subresources whose responses are not objects
_REVIEWS = (
    ("authorization.k8s.io", ["selfsubjectaccessreviews"]),
    ("authentication.k8s.io", ["selfsubjectreviews"]),
)
