"""The Kubernetes API, as the operator, the kubelet and ``kubeai local`` use it.

Owns: the connections (kubernetes_asyncio loads kubeconfigs, tokens and exec plug-ins), the verbs,
:meth:`Kube.follow`, which keeps a caller's view of a collection current for ever, and
:meth:`Kube.fenced`, through which a leader writes. Objects are dicts, or any type that msgspec
decodes straight from the bytes.

Promises: every failure of a call is an :class:`ApiError` (status 0 when no answer came); nothing
is retried here but ``follow`` and one call after a 401 that a fresh token mends; every call and
every silence on a watch has a limit in seconds; and what the peer has not acknowledged after
``unacknowledged_max_s`` is given up with its connection, so that it does not arrive late.
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

from kubeai import channels
from kubeai.errors import KubeAIError
from kubeai.http import aiohttp
from kubeai.imports import without_init
from kubeai.logs import get_logger

with without_init("kubernetes_asyncio", "kubernetes_asyncio.client") as (_, client):
    from kubernetes_asyncio.client.configuration import Configuration

    if not hasattr(client, "Configuration"):  # what `config` wants of the package
        client.Configuration, client.ApiClient = Configuration, None  # type: ignore[attr-defined]
    from kubernetes_asyncio import config as kube_config

log = get_logger(__name__)
Object = dict[str, Any]
if TYPE_CHECKING:
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Object)  # what an object is decoded as
PatchKind = Literal["merge", "json", "strategic"]

CALL_TIMEOUT_S = 30.0
UNACKNOWLEDGED_MAX_S = 5.0  # by default: as long as a lease outlasts its leader
LIST_TIMEOUT_S = 120.0
LIST_PAGE_MAX_ITEMS = 500
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
WATCH_TIMEOUT_S = (240.0, 300.0)  # the server ends a watch after a time between the two
WATCH_SILENCE_MAX_S = 330.0
EVENT_MAX_BYTES = 64 << 20
EXEC_OUTPUT_MAX_BYTES = 64 << 10  # what is kept of a command's output: its end
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
    """A collection of the API."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """What an object's ``apiVersion`` says."""
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

    ``status`` is HTTP's, or 0 when no answer came (then the write may have happened).
    """

    def __init__(
        self, status: int, reason: str, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.retry_after_s = retry_after_s


class ExecResult(NamedTuple):
    """A command that ran in a container; ``output`` is the end of its stdout and stderr."""

    exit_code: int
    output: str


class Backoff:
    """Growing waits with jitter, so that many callers of one server spread out.

    The n-th wait is random between a half and all of ``first_s × 2ⁿ``, at most ``max_s``.
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
        """The next wait, in seconds; counts one more failure."""
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
    """A connection to one Kubernetes API; make it with :meth:`connect`, end it with ``close``."""

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
        self._sessions: builtins.list[aiohttp.ClientSession] = []  # of those fenced, too
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

        Raises KubeAIError when none of them can be read. Sends nothing yet.
        """
        configuration = Configuration()
        path = kubeconfig or os.environ.get("KUBECONFIG")
        environment = os.environ.get("POD_NAMESPACE", "")
        if not path:
            try:
                _in_cluster(configuration)
            except kube_config.ConfigException as error:
                raise KubeAIError(
                    f"no Kubernetes API: KUBECONFIG is not set, and not in a cluster ({error})"
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
        except Exception as error:  # a wrong file ends in whatever the YAML made of it
            raise KubeAIError(f"kubeconfig {path}: is not a kubeconfig ({error})") from error
        context = (loader.current_context or {}).get("context") or {}
        namespace = context.get("namespace") or environment or "default"
        return cls(configuration, namespace, loader, unacknowledged_max_s)

    def fenced(self, check: Callable[[], None]) -> Kube:
        """The same API, over the same connections, for one who may write only while ``check`` says.

        ``check`` is called as the last thing before the bytes of a write, or of a command, are
        handed to their connection, however long they waited for it. What it raises ends the call,
        and nothing is sent. Reads are not checked. Closed with the Kube that it is made from.
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
        """One object, as the API has it now (not from a cache)."""
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
        """The items and the list's resourceVersion. No namespace: all of them.

        ``metadata_only``: the items have their metadata alone (PartialObjectMetadata).
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
        """Create; ApiError 409 (AlreadyExists) when the name is taken."""
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
        """Replace; with a resourceVersion in it, ApiError 409 (Conflict) when it is not current."""
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
        """Patch; a ``metadata.resourceVersion`` in it makes the patch conditional."""
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
        """Delete; ApiError 404 when it is gone, 409 when uid or resourceVersion differ."""
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
        """Run a command in a container of a pod, until it has ended; it gets no stdin.

        Needs the verbs get and create on pods/exec: which of them is asked, versions differ in.
        ApiError when it did not run (404: no such pod), and when its end is not known (status 0;
        reason Timeout after ``timeout_s`` seconds): then it may have run, and a node may let it
        go on.
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

        A bookmark's object has metadata.resourceVersion and little more. ApiError 410 when
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
        """List and watch for ever (until cancelled).

        ``replaced`` gets the whole list, first and after a 410; ``changed`` gets each event
        (ADDED, MODIFIED, DELETED) as it comes. Both are called in order and must not block. An
        object that does not decode as ``type`` is logged and passed over; what came before it
        stays. Failures are told to ``failed`` and retried with back-off and jitter, from the last
        resourceVersion; where the server has forgotten that, it is asked for a list at once.
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
                            version = ""  # which one is gone, only a list can tell
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

    # -- how it is done --------------------------------------------------------------------------

    def _open_session(self, *traces: aiohttp.TraceConfig) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=self._connector,
            connector_owner=False,
            # As Go does: a proxy from the environment is not asked for this machine's own API.
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
            async with asyncio.timeout(CALL_TIMEOUT_S):  # to answer; then it may be silent
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
        """Where the check refused a body, aiohttp says no more than that it was not sent."""
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
        """Read the kubeconfig's credentials again, at most every 10 s."""
        now = time.monotonic()
        if self._loader is None or now - self._renewed_at < 10 < now:
            return False
        self._renewed_at = now
        with contextlib.suppress(Exception):  # the 401 itself is the better message
            await self._loader.load_and_set(self._configuration)
            return True
        return False


def fence(check: Callable[[], None]) -> aiohttp.TraceConfig:
    """For a session whose requests may be sent only while ``check`` says; see :meth:`Kube.fenced`.

    aiohttp calls these two with the connection in hand: the first when the headers are about to be
    written, the second, a turn of the event loop later, when the body is; they go out together.
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
    """A socket that drops what its peer does not acknowledge in time, even once it is closed.

    Otherwise Linux sends it again for some 15 minutes, and a write that was lost in a partition
    takes effect when that heals.
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
        raise ApiError(0, "Undecodable", f"the API's answer does not decode: {error}") from error


def _decode_leniently(r: Resource, raw: msgspec.Raw, type_: Any) -> Any:
    try:
        return _decoder(type_).decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.error("object passed over", resource=r.plural, error=str(error), start=bytes(raw)[:200])
        return None


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Split at newlines; unlike StreamReader.readline, a line may be longer than its buffer."""
    parts: list[bytes] = []
    held_bytes = 0
    async for chunk in content.iter_any():
        first, *lines = chunk.split(b"\n")
        parts.append(first)
        held_bytes += len(first)
        if held_bytes > EVENT_MAX_BYTES:
            raise ApiError(0, "TooLarge", f"a watch event has more than {EVENT_MAX_BYTES} bytes")
        for line in lines:
            whole = b"".join(parts)
            if whole.strip():
                yield whole
            parts, held_bytes = [line], len(line)


async def _tell_refused_upgrade(response: aiohttp.ClientResponse) -> None:
    """aiohttp's error for an upgrade that is refused would not have the Status that says why."""
    if response.status >= 400 and "Upgrade" in response.request_info.headers:
        raise _api_error(response, await response.read())


async def _command_result(messages: aiohttp.ClientWebSocketResponse) -> ExecResult:
    """Read an exec's channels until one says how the command ended."""
    output = bytearray()
    async for message in messages:
        if message.type is not aiohttp.WSMsgType.BINARY or len(message.data) < 2:
            continue  # an empty message says only that the channel is there
        channel, data = message.data[0], message.data[1:]
        if channel in (channels.STDOUT, channels.STDERR):
            output += data
            del output[:-EXEC_OUTPUT_MAX_BYTES]
        elif channel == channels.ERROR:
            try:
                ending = channels.Ending.decode(data)
            except ValueError as error:
                raise ApiError(0, "Undecodable", f"how the command ended: {error}") from error
            if ending.exit_code is None:
                raise ApiError(ending.status, ending.reason, ending.message)
            return ExecResult(ending.exit_code, output.decode(errors="replace"))
    code = messages.close_code
    raise ApiError(0, "Unreachable", f"the connection ended before the command did ({code})")


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
    """A silent watch whose peer is gone without a word is noticed after about 20 s.

    The first probe is sent after 15; the second finds the socket's limit for what is not
    acknowledged (see `_socket`) exceeded, which stands here for a count of probes.
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
