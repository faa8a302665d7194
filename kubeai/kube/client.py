"""A Kubernetes API client, used by the operator, the kubelet and ``kubeai local``.

Owns the connections (kubernetes_asyncio loads kubeconfigs, tokens and exec plug-ins), the verbs,
:meth:`Kube.follow`, which keeps a caller's view of a collection up to date, and
:meth:`Kube.fenced`, through which a leader writes. Objects are dicts, or any type that msgspec
decodes directly from the response.

Promises: every failed call raises :class:`ApiError` (status 0 if there was no response). Only
``follow`` retries, and a call that got 401 is repeated once with refreshed credentials. Every call
has a timeout, and so has silence on a watch. Data that the peer has not acknowledged within
``unacknowledged_max_s`` is dropped together with its connection, so that no write arrives late.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import copy
import os
import random
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from urllib.parse import urlencode, urlsplit

import msgspec

from kubeai.errors import KubeAIError
from kubeai.http import aiohttp
from kubeai.imports import without_init
from kubeai.kube import exec_channels as channels
from kubeai.logs import get_logger

with without_init("kubernetes_asyncio", "kubernetes_asyncio.client") as (_, client):
    from kubernetes_asyncio.client.configuration import Configuration

    if not hasattr(client, "Configuration"):  # names that `config` imports from the package
        client.Configuration, client.ApiClient = Configuration, None  # type: ignore[attr-defined]
    from kubernetes_asyncio import config as kube_config

log = get_logger(__name__)
Object = dict[str, Any]
if TYPE_CHECKING:
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Object)  # the type that objects are decoded as
PatchKind = Literal["merge", "json", "strategic"]

CALL_TIMEOUT_S = 30.0
UNACKNOWLEDGED_MAX_S = 5.0  # default leaseDuration - renewDeadline
LIST_TIMEOUT_S = 120.0
LIST_PAGE_MAX_ITEMS = 500
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
WATCH_TIMEOUT_S = (240.0, 300.0)  # range of the timeout that the server is asked for
WATCH_SILENCE_MAX_S = 330.0
EVENT_MAX_BYTES = 64 << 20
EXEC_OUTPUT_MAX_BYTES = 64 << 10  # the tail of a command's output that is kept
EXEC_MESSAGE_MAX_BYTES = 4 << 20
EXEC_CLOSE_TIMEOUT_S = 1.0
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 10.0
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_CONTENT_TYPE = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
}


class Resource(NamedTuple):
    """An API resource type."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """The ``apiVersion`` of its objects."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str = "", name: str = "", subresource: str = "") -> str:
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        return "/" + "/".join([*parts, self.plural, *filter(None, (name, subresource))])


PODS = Resource("", "v1", "pods", "Pod")
CONFIGMAPS = Resource("", "v1", "configmaps", "ConfigMap")
SECRETS = Resource("", "v1", "secrets", "Secret")
NODES = Resource("", "v1", "nodes", "Node", namespaced=False)
NAMESPACES = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
PVCS = Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
EVENTS = Resource("", "v1", "events", "Event")
JOBS = Resource("batch", "v1", "jobs", "Job")
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
MODELS = Resource("kubeai.org", "v1", "models", "Model")
CRDS = Resource(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", False
)


class ApiError(KubeAIError):
    """A call to the Kubernetes API failed.

    ``status`` is the HTTP status, or 0 if there was no response (a write may have been applied).
    """

    def __init__(
        self, status: int, reason: str, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


class ExecResult(NamedTuple):
    """Result of a command in a container; ``output`` is the tail of its stdout and stderr."""

    exit_code: int
    output: str


class Backoff:
    """Exponential back-off with jitter, so that many clients of one server spread out.

    The n-th wait is random between half and all of ``first_s × 2ⁿ``, at most ``max_s``.
    """

    def __init__(
        self,
        first_s: float = BACKOFF_FIRST_S,
        max_s: float = BACKOFF_MAX_S,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self._first_s, self._max_s, self._random = first_s, max_s, rand
        self.failures = 0

    def reset(self) -> None:
        self.failures = 0

    def next_s(self) -> float:
        """Count a failure and return the next wait in seconds."""
        wait_s = min(self._max_s, self._first_s * 2.0 ** min(self.failures, 32))
        self.failures += 1
        return wait_s * (0.5 + 0.5 * self._random())


class _Status(msgspec.Struct):
    message: str = ""
    reason: str = ""
    code: int = 0


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _Page(msgspec.Struct):
    metadata: _ListMeta = msgspec.field(default_factory=_ListMeta)
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Versioned(msgspec.Struct):
    metadata: _ListMeta


class _Loader(Protocol):
    async def load_and_set(self, configuration: Configuration) -> None: ...


_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {}


def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    if type_ not in _DECODERS:
        _DECODERS[type_] = msgspec.json.Decoder(type_)
    return _DECODERS[type_]


class Kube:
    """A client for one Kubernetes API. Create it with :meth:`connect`, end it with ``close``."""

    def __init__(
        self,
        configuration: Configuration,
        namespace: str,
        loader: _Loader | None = None,
        unacknowledged_max_s: float = UNACKNOWLEDGED_MAX_S,
    ) -> None:
        self.namespace = namespace
        self._configuration = configuration
        self._loader = loader
        self._renewed_at = 0.0
        self._base = str(configuration.host)
        self._connector = aiohttp.TCPConnector(
            limit=configuration.connection_pool_maxsize,
            ssl=_tls(configuration),
            socket_factory=partial(_socket, unacknowledged_max_s=unacknowledged_max_s),
        )
        self._check: Callable[[], None] | None = None
        self._sessions: builtins.list[aiohttp.ClientSession] = []  # fenced ones too
        self._session = self._open_session()
        self._options: dict[str, Any] = {}
        if configuration.proxy:
            self._options["proxy"] = configuration.proxy
        if configuration.tls_server_name:
            self._options["server_hostname"] = configuration.tls_server_name

    @classmethod
    async def connect(
        cls, kubeconfig: str | None = None, *, unacknowledged_max_s: float = UNACKNOWLEDGED_MAX_S
    ) -> Kube:
        """Use ``kubeconfig``, else $KUBECONFIG, else the pod's service account.

        KubeAIError if the one that applies cannot be read. Does not contact the server yet.
        """
        configuration = Configuration()
        path = kubeconfig or os.environ.get("KUBECONFIG")
        environment = os.environ.get("POD_NAMESPACE", "")
        if not path:
            try:
                _in_cluster(configuration)
            except kube_config.ConfigException as error:
                raise KubeAIError(
                    f"no Kubernetes API: KUBECONFIG is not set and this is not a pod ({error})"
                ) from error
            namespace = environment or _account_namespace() or "default"
            return cls(configuration, namespace, None, unacknowledged_max_s)
        missing = _missing_files(path)
        if missing:
            raise KubeAIError(f"kubeconfig {missing[0]}: no such file")
        try:
            loader = await kube_config.load_kube_config(
                config_file=path, client_configuration=configuration
            )
        except kube_config.ConfigException as error:
            raise KubeAIError(f"kubeconfig {path}: {error}") from error
        except Exception as error:  # an invalid file can raise anything
            raise KubeAIError(f"kubeconfig {path}: not a valid kubeconfig ({error})") from error
        context = (loader.current_context or {}).get("context") or {}
        namespace = context.get("namespace") or environment or "default"
        return cls(configuration, namespace, loader, unacknowledged_max_s)

    def fenced(self, check: Callable[[], None]) -> Kube:
        """A client on the same connections whose writes are only sent if ``check`` passes.

        ``check`` is called right before the bytes of a write or of an exec are handed to their
        connection, after any wait for that connection. If it raises, nothing is sent and the call
        fails with its exception. Reads are not checked. Closed together with the original client.
        """
        fenced = copy.copy(self)
        fenced._check = check
        fenced._session = fenced._open_session(fence(check))
        return fenced

    async def close(self) -> None:
        """Close every connection; calls in flight fail."""
        for session in self._sessions:
            await session.close()
        await self._connector.close()

    # -- verbs -----------------------------------------------------------------------------------

    async def get(
        self,
        r: Resource,
        name: str,
        namespace: str = "",
        *,
        type: type[T] = dict,  # type: ignore[assignment]
    ) -> T:
        """Read one object from the API server, not from a cache."""
        path = r.path(namespace or self.namespace, name)
        return _decode(await self._call("GET", path), type)

    async def list(
        self,
        r: Resource,
        namespace: str = "",
        *,
        labels: str = "",
        fields: str = "",
        metadata_only: bool = False,
        type: type[T] = dict,  # type: ignore[assignment]
    ) -> tuple[builtins.list[T], str]:
        """The items and the list's resourceVersion. Without a namespace, lists all namespaces.

        ``metadata_only``: return only the items' metadata (PartialObjectMetadata).
        """
        items: builtins.list[Any] = []
        version = ""
        accept = METADATA_LIST if metadata_only else ""
        async for page in self._pages(r, namespace, labels, fields, accept):
            version = page.metadata.resource_version
            items += [_decode(raw, type) for raw in page.items or ()]
        return items, version

    async def create(
        self,
        r: Resource,
        obj: Object,
        namespace: str = "",
        *,
        type: type[T] = dict,  # type: ignore[assignment]
    ) -> T:
        """Create an object. ApiError 409 (AlreadyExists) if the name is taken."""
        path = r.path(self._namespace_of(obj, namespace))
        return _decode(await self._call("POST", path, body=_with_kind(r, obj)), type)

    async def update(
        self,
        r: Resource,
        obj: Object,
        namespace: str = "",
        *,
        subresource: str = "",
        type: type[T] = dict,  # type: ignore[assignment]
    ) -> T:
        """Replace an object. ApiError 409 (Conflict) if it has an outdated resourceVersion."""
        path = r.path(self._namespace_of(obj, namespace), obj["metadata"]["name"], subresource)
        body = obj if subresource == "scale" else _with_kind(r, obj)
        return _decode(await self._call("PUT", path, body=body), type)

    async def patch(
        self,
        r: Resource,
        name: str,
        patch: Object | builtins.list[Any],
        namespace: str = "",
        *,
        subresource: str = "",
        kind: PatchKind = "merge",
        type: type[T] = dict,  # type: ignore[assignment]
    ) -> T:
        """Patch an object. A ``metadata.resourceVersion`` in it makes the patch conditional."""
        path = r.path(namespace or self.namespace, name, subresource)
        answer = await self._call("PATCH", path, body=patch, content_type=_CONTENT_TYPE[kind])
        return _decode(answer, type)

    async def delete(
        self,
        r: Resource,
        name: str,
        namespace: str = "",
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        grace_s: float | None = None,
        propagation: Literal["Orphan", "Background", "Foreground"] | None = None,
    ) -> None:
        """Delete an object. ApiError 404 if it is gone, 409 if uid or resourceVersion differ."""
        preconditions = {"uid": uid, "resourceVersion": resource_version}
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {k: v for k, v in preconditions.items() if v is not None} or None,
            "gracePeriodSeconds": None if grace_s is None else int(grace_s),
            "propagationPolicy": propagation,
        }
        body = {k: v for k, v in options.items() if v is not None}
        await self._call("DELETE", r.path(namespace or self.namespace, name), body=body)

    async def exec(
        self,
        name: str,
        command: Sequence[str],
        *,
        container: str,
        namespace: str = "",
        timeout_s: float,
    ) -> ExecResult:
        """Run a command in a pod's container, without stdin, and wait until it ends.

        Needs the verbs get and create on pods/exec, because Kubernetes versions check different
        ones. ApiError if the command did not run (404: no such pod) or its outcome is unknown
        (status 0; reason Timeout after ``timeout_s`` seconds). In the latter case it may have run,
        and may still be running on the node.
        """
        query = [("command", word) for word in command]
        query += [("container", container), ("stdout", "true"), ("stderr", "true")]
        path = PODS.path(namespace or self.namespace, name, "exec")
        try:
            async with asyncio.timeout(timeout_s):
                messages = await self._upgrade(path, query)
                try:
                    return await _command_result(messages)
                finally:
                    await messages.close()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._ask_again()
            raise _no_answer("exec", name, error) from error

    # -- watching --------------------------------------------------------------------------------

    async def watch(
        self,
        r: Resource,
        namespace: str = "",
        *,
        resource_version: str,
        labels: str = "",
        fields: str = "",
        type: type[T] = dict,  # type: ignore[assignment]
    ) -> AsyncIterator[tuple[str, T]]:
        """(ADDED | MODIFIED | DELETED | BOOKMARK, object) until the server ends the watch.

        A bookmark's object has little more than metadata.resourceVersion. ApiError 410 if
        ``resource_version`` is too old: list again.
        """
        async with contextlib.aclosing(
            self._events(r, namespace, resource_version, labels, fields)
        ) as events:
            async for kind, _, raw in events:
                yield kind, _decode(raw, type)

    async def follow(
        self,
        r: Resource,
        namespace: str = "",
        *,
        labels: str = "",
        fields: str = "",
        type: type[T] = dict,  # type: ignore[assignment]
        replaced: Callable[[builtins.list[T]], None],
        changed: Callable[[str, T], None],
        failed: Callable[[ApiError], None] = lambda error: None,
    ) -> None:
        """List and watch until cancelled.

        ``replaced`` gets the whole list, at first and after a 410; ``changed`` gets each event
        (ADDED, MODIFIED, DELETED). Both are called in order and must not block. An object that
        cannot be decoded as ``type`` is logged and skipped; the caller keeps its previous version.
        Failures are reported to ``failed`` and retried with back-off and jitter from the last
        resourceVersion. If that has expired, the collection is listed again at once.
        """
        backoff = Backoff()
        version = ""
        while True:
            began, broke, forgotten = time.monotonic(), False, False
            resumed = version != ""
            retry_after_s = 0.0
            try:
                if not version:
                    items, version = await self._list_leniently(r, namespace, labels, fields, type)
                    replaced(items)
                async with contextlib.aclosing(
                    self._events(r, namespace, version, labels, fields)
                ) as events:
                    async for kind, version, raw in events:
                        backoff.reset()
                        if kind == "BOOKMARK":
                            continue
                        obj = _decode_leniently(r, raw, type)
                        if obj is not None:
                            changed(kind, obj)
                        elif kind == "DELETED":
                            version = ""  # only a new list can show which object was deleted
                            break
            except ApiError as error:
                broke = True
                failed(error)
                if error.status == 410:
                    version = ""
                    forgotten = resumed
                retry_after_s = min(error.retry_after_s or 0.0, BACKOFF_MAX_S)
                log.info("watch failed", resource=r.plural, status=error.status, error=str(error))
            if not forgotten and (broke or time.monotonic() - began < 1.0):
                await asyncio.sleep(max(backoff.next_s(), retry_after_s))

    # -- implementation --------------------------------------------------------------------------

    def _open_session(self, *traces: aiohttp.TraceConfig) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=self._connector,
            connector_owner=False,
            # Like Go's HTTP client, do not use a proxy from the environment for loopback addresses.
            trust_env=not _is_loopback(self._base),
            read_bufsize=1 << 20,
            raise_for_status=_tell_refused_upgrade,
            skip_auto_headers=("User-Agent",),
            trace_configs=[*traces],
        )
        self._sessions.append(session)
        return session

    def _namespace_of(self, obj: Object, namespace: str) -> str:
        return namespace or obj["metadata"].get("namespace") or self.namespace

    async def _list_leniently(
        self, r: Resource, namespace: str, labels: str, fields: str, type_: Any
    ) -> tuple[builtins.list[Any], str]:
        items: builtins.list[Any] = []
        version = ""
        async for page in self._pages(r, namespace, labels, fields):
            version = page.metadata.resource_version
            decoded = (_decode_leniently(r, raw, type_) for raw in page.items or ())
            items += [item for item in decoded if item is not None]
        return items, version

    async def _pages(
        self, r: Resource, namespace: str, labels: str, fields: str, accept: str = ""
    ) -> AsyncIterator[_Page]:
        query = {"limit": str(LIST_PAGE_MAX_ITEMS)} | _selectors(labels, fields)
        while True:
            body = await self._call(
                "GET", r.path(namespace), query, accept=accept, timeout_s=LIST_TIMEOUT_S
            )
            page = _decode(body, _Page)
            yield page
            if not page.metadata.continue_:
                return
            query["continue"] = page.metadata.continue_

    async def _events(
        self, r: Resource, namespace: str, version: str, labels: str, fields: str
    ) -> AsyncGenerator[tuple[str, str, msgspec.Raw], None]:
        """(type, resourceVersion, object) of one watch."""
        query = {
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(int(random.uniform(*WATCH_TIMEOUT_S))),
        } | _selectors(labels, fields)
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CALL_TIMEOUT_S, sock_read=WATCH_SILENCE_MAX_S
        )
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):  # for the response's head only
                response = await self._send("GET", r.path(namespace), query, timeout=timeout)
            async with response:
                if response.status == 401:
                    await self._renew()  # for the next watch
                if response.status >= 400:
                    raise _api_error(response, await response.read())
                _notice_dead_peers(response)
                async for line in _lines(response.content):
                    event = _decode(line, _Event)
                    if event.type == "ERROR":
                        status = _decode(event.object, _Status)
                        raise ApiError(status.code, status.reason, status.message)
                    meta = _decode(event.object, _Versioned).metadata
                    yield event.type, meta.resource_version, event.object
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _no_answer("watch", r.plural, error) from error

    async def _call(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        *,
        body: Any = None,
        content_type: str = "application/json",
        accept: str = "",
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> bytes:
        data = None if body is None else msgspec.json.encode(body)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            response = await self._send(method, path, query, data, content_type, timeout, accept)
            async with response:
                answer = await response.read()
                if response.status == 401 and await self._renew():
                    again = await self._send(
                        method, path, query, data, content_type, timeout, accept
                    )
                    async with again:
                        response, answer = again, await again.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if method != "GET":
                self._ask_again()
            raise _no_answer(method, path, error) from error
        if response.status >= 400:
            raise _api_error(response, answer)
        return answer

    def _ask_again(self) -> None:
        """Repeat the check, since aiohttp hides an exception that it raised for a body."""
        if self._check is not None:
            self._check()

    async def _send(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        data: bytes | None = None,
        content_type: str = "",
        timeout: aiohttp.ClientTimeout | None = None,
        accept: str = "",
    ) -> aiohttp.ClientResponse:
        headers = await self._headers()
        if accept:
            headers["Accept"] = accept
        if data is not None:
            headers["Content-Type"] = content_type
        url = self._base + path + ("?" + urlencode(query) if query else "")
        return await self._session.request(
            method, url, data=data, headers=headers, timeout=timeout, **self._options
        )

    async def _upgrade(
        self, path: str, query: builtins.list[tuple[str, str]]
    ) -> aiohttp.ClientWebSocketResponse:
        url = f"{self._base}{path}?{urlencode(query)}"
        while True:
            try:
                messages: aiohttp.ClientWebSocketResponse = await self._session.ws_connect(
                    url,
                    protocols=(channels.V4,),
                    headers=await self._headers(),
                    timeout=aiohttp.ClientWSTimeout(ws_close=EXEC_CLOSE_TIMEOUT_S),
                    max_msg_size=EXEC_MESSAGE_MAX_BYTES,
                    **self._options,
                )
                return messages
            except ApiError as error:
                if error.status != 401 or not await self._renew():
                    raise

    async def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "kubeai"}
        for setting in (await self._configuration.auth_settings()).values():
            if setting["value"]:
                headers[setting["key"]] = setting["value"].strip()
        return headers

    async def _renew(self) -> bool:
        """Reload the kubeconfig's credentials, at most every 10 s."""
        now = time.monotonic()
        if self._loader is None or now - self._renewed_at < 10 < now:
            return False
        self._renewed_at = now
        with contextlib.suppress(Exception):  # the 401 is the more useful error
            await self._loader.load_and_set(self._configuration)
            return True
        return False


def fence(check: Callable[[], None]) -> aiohttp.TraceConfig:
    """Make a session send its requests only if ``check`` passes; see :meth:`Kube.fenced`.

    aiohttp calls these two hooks when it has a connection: the first right before the headers are
    written, the second one event-loop iteration later, before the body. Both are sent together.
    """

    async def headers(
        session: aiohttp.ClientSession, context: object, sent: aiohttp.TraceRequestHeadersSentParams
    ) -> None:
        if sent.method != "GET" or "Upgrade" in sent.headers:
            check()

    async def body(
        session: aiohttp.ClientSession, context: object, sent: aiohttp.TraceRequestChunkSentParams
    ) -> None:
        if sent.method != "GET":
            check()

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(headers)
    trace.on_request_chunk_sent.append(body)
    return trace


def _tls(configuration: Configuration) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.disable_strict_ssl_verification:
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _socket(address: aiohttp.AddrInfoType, *, unacknowledged_max_s: float) -> socket.socket:
    """A socket that drops data its peer does not acknowledge in time, even after it is closed.

    Otherwise Linux retransmits for about 15 minutes, and a write that was lost in a network
    partition takes effect when the partition heals.
    """
    family, kind, protocol, _, _ = address
    sock = socket.socket(family, kind, protocol)
    limit_ms = max(1, round(unacknowledged_max_s * 1000))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
    return sock


def _in_cluster(configuration: Configuration) -> None:
    kube_config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]


def _missing_files(paths: str) -> list[str]:
    return [path for path in paths.split(os.pathsep) if not Path(path).is_file()]


def _selectors(labels: str, fields: str) -> dict[str, str]:
    given = {"labelSelector": labels, "fieldSelector": fields}
    return {key: value for key, value in given.items() if value}


def _with_kind(r: Resource, obj: Object) -> Object:
    return {"apiVersion": r.api_version, "kind": r.kind} | obj


def _decode(data: bytes | msgspec.Raw, type_: type[T]) -> T:
    try:
        decoded: T = _decoder(type_).decode(data)
        return decoded
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(0, "Undecodable", f"cannot decode the response: {error}") from error


def _decode_leniently(r: Resource, raw: msgspec.Raw, type_: Any) -> Any:
    try:
        return _decoder(type_).decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.error("object skipped", resource=r.plural, error=str(error), start=bytes(raw)[:200])
        return None


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Split at newlines. Unlike StreamReader.readline, allows lines longer than the buffer."""
    parts: list[bytes] = []
    held_bytes = 0
    async for chunk in content.iter_any():
        first, *lines = chunk.split(b"\n")
        parts.append(first)
        held_bytes += len(first)
        if held_bytes > EVENT_MAX_BYTES:
            raise ApiError(0, "TooLarge", f"watch event larger than {EVENT_MAX_BYTES} bytes")
        for line in lines:
            whole = b"".join(parts)
            if whole.strip():
                yield whole
            parts, held_bytes = [line], len(line)


async def _tell_refused_upgrade(response: aiohttp.ClientResponse) -> None:
    """Raise the Status of a refused upgrade, which aiohttp's own error does not include."""
    if response.status >= 400 and "Upgrade" in response.request_info.headers:
        raise _api_error(response, await response.read())


async def _command_result(messages: aiohttp.ClientWebSocketResponse) -> ExecResult:
    """Read an exec's channels until the command's status arrives."""
    output = bytearray()
    async for message in messages:
        if message.type is not aiohttp.WSMsgType.BINARY or len(message.data) < 2:
            continue  # an empty message only announces the channel
        channel, data = message.data[0], message.data[1:]
        if channel in (channels.STDOUT, channels.STDERR):
            output += data
            del output[:-EXEC_OUTPUT_MAX_BYTES]
        elif channel == channels.ERROR:
            try:
                ending = channels.Ending.decode(data)
            except ValueError as error:
                raise ApiError(0, "Undecodable", f"command status: {error}") from error
            if ending.exit_code is None:
                raise ApiError(ending.status, ending.reason, ending.message)
            return ExecResult(ending.exit_code, output.decode(errors="replace"))
    code = messages.close_code
    raise ApiError(0, "Unreachable", f"connection closed before the command ended ({code})")


def _api_error(response: aiohttp.ClientResponse, body: bytes) -> ApiError:
    try:
        status = _decoder(_Status).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        status = _Status(message=body[:200].decode(errors="replace").strip())
    retry_after = response.headers.get("Retry-After", "")
    return ApiError(
        response.status,
        status.reason or response.reason or "",
        status.message or f"HTTP {response.status}",
        float(retry_after) if retry_after.isdecimal() else None,
    )


def _no_answer(verb: str, what: str, error: Exception) -> ApiError:
    reason = "Timeout" if isinstance(error, TimeoutError) else "Unreachable"
    return ApiError(0, reason, f"{verb} {what}: {error or type(error).__name__}")


def _notice_dead_peers(response: aiohttp.ClientResponse) -> None:
    """Enable keep-alive, so that a watch whose peer vanished silently fails after about 20 s.

    The first probe is sent after 15 s. When the second is due, the socket's limit for
    unacknowledged data (see `_socket`) is exceeded; it replaces the probe count here.
    """
    connection = response.connection
    transport = connection.transport if connection is not None else None
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _account_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return ""


__all__ = [
    "CONFIGMAPS",
    "CRDS",
    "EVENTS",
    "JOBS",
    "LEASES",
    "MODELS",
    "NAMESPACES",
    "NODES",
    "PODS",
    "PVCS",
    "SECRETS",
    "ApiError",
    "Backoff",
    "ExecResult",
    "Kube",
    "Resource",
    "fence",
]
