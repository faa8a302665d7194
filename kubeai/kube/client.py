"""A Kubernetes API client.

Used by the operator, the supervisor, ``kubeai local`` with its kubelet, and the commands for keys.

Owns the connections, the verbs, :meth:`Kube.follow`, which keeps a caller's view of a collection
up to date, and :meth:`Kube.fenced`, through which a leader writes. Objects are dicts, or any type
that msgspec decodes directly from the response.

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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlencode

import aiohttp
import msgspec

from kubeai.kube.auth import Access, load_access
from kubeai.kube.connections import is_loopback, open_socket, tls_context
from kubeai.kube.decoding import Page, decode, decode_leniently
from kubeai.kube.errors import ApiError, api_error, no_response
from kubeai.kube.exec import PROTOCOL_V4, ExecResult, command_result, raise_refused_upgrade
from kubeai.kube.fencing import fence
from kubeai.kube.resources import PODS, Object, Resource, Selection
from kubeai.kube.watch import RawEvent, follow, watch_events

if TYPE_CHECKING:
    from kubeai.kube.decoding import T
PatchKind = Literal["merge", "json", "strategic"]

CONNECTIONS_MAX = 100
CALL_TIMEOUT_S = 30.0
UNACKNOWLEDGED_MAX_S = 5.0  # default leaseDuration - renewDeadline
LIST_TIMEOUT_S = 120.0
LIST_PAGE_MAX_ITEMS = 500
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
EXEC_MESSAGE_MAX_BYTES = 4 << 20
EXEC_CLOSE_TIMEOUT_S = 1.0
_CONTENT_TYPE = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
}


class Kube:
    """A client for one Kubernetes API. Create it with :meth:`connect`, end it with ``close``."""

    def __init__(
        self, access: Access, *, unacknowledged_max_s: float = UNACKNOWLEDGED_MAX_S
    ) -> None:
        self.namespace = access.namespace
        self._credentials = access.credentials
        self._base = access.host
        self._connector = aiohttp.TCPConnector(
            limit=CONNECTIONS_MAX,
            ssl=tls_context(access),
            socket_factory=partial(open_socket, unacknowledged_max_s=unacknowledged_max_s),
        )
        self._check: Callable[[], None] | None = None
        self._sessions: builtins.list[aiohttp.ClientSession] = []  # fenced ones too
        self._session = self._open_session()
        self._options: dict[str, Any] = {}
        if access.proxy:
            self._options["proxy"] = access.proxy
        if access.tls_server_name:
            self._options["server_hostname"] = access.tls_server_name

    @classmethod
    async def connect(
        cls, kubeconfig: str | None = None, *, unacknowledged_max_s: float = UNACKNOWLEDGED_MAX_S
    ) -> Kube:
        """Use ``kubeconfig``, else $KUBECONFIG, else the pod's service account.

        KubeAIError if the one that applies cannot be read. Does not contact the server yet.
        """
        access = await load_access(kubeconfig)
        return cls(access, unacknowledged_max_s=unacknowledged_max_s)

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
        return decode(await self._call("GET", path), type)

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
        async for page in self._pages(Selection(r, namespace, labels, fields), accept):
            version = page.metadata.resource_version
            items += [decode(raw, type) for raw in page.items or ()]
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
        return decode(await self._call("POST", path, body=r.typed(obj)), type)

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
        body = obj if subresource == "scale" else r.typed(obj)
        return decode(await self._call("PUT", path, body=body), type)

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
        return decode(answer, type)

    async def apply(
        self,
        r: Resource,
        obj: Object,
        namespace: str = "",
        *,
        manager: str,
        type: type[T] = dict,  # type: ignore[assignment]
    ) -> T:
        """Create or update an object by server-side apply. Unknown fields are an error.

        Takes over fields that other managers own.
        """
        path = r.path(self._namespace_of(obj, namespace), obj["metadata"]["name"])
        query = {"fieldManager": manager, "force": "true", "fieldValidation": "Strict"}
        answer = await self._call(
            "PATCH", path, query, body=r.typed(obj), content_type="application/apply-patch+yaml"
        )
        return decode(answer, type)

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
                    return await command_result(messages)
                finally:
                    await messages.close()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._recheck()
            raise no_response("exec", name, error) from error

    @contextlib.asynccontextmanager
    async def log(
        self, name: str, *, container: str, namespace: str = "", tail_lines: int
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Follow a container's log: ``async with kube.log(…) as blocks``, until the container ends.

        ApiError 400 if the container has not started. ``tail_lines``: how many old ones to begin
        with.
        """
        path = PODS.path(namespace or self.namespace, name, "log")
        query = {"container": container, "follow": "true", "tailLines": str(tail_lines)}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CALL_TIMEOUT_S)
        try:
            async with await self._send("GET", path, query, timeout=timeout) as response:
                if response.status >= 400:
                    raise api_error(response, await response.read())
                yield response.content.iter_any()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise no_response("GET", path, error) from error

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
        selection = Selection(r, namespace, labels, fields)
        async with contextlib.aclosing(self._events(selection, resource_version)) as events:
            async for kind, _, raw in events:
                yield kind, decode(raw, type)

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
        selection = Selection(r, namespace, labels, fields)
        await follow(
            r,
            type,
            list_all=partial(self._list_leniently, selection, type),
            events=partial(self._events, selection),
            replaced=replaced,
            changed=changed,
            failed=failed,
        )

    # -- implementation --------------------------------------------------------------------------

    def _open_session(self, *traces: aiohttp.TraceConfig) -> aiohttp.ClientSession:
        session = aiohttp.ClientSession(
            connector=self._connector,
            connector_owner=False,
            # Like Go's HTTP client, do not use a proxy from the environment for loopback addresses.
            trust_env=not is_loopback(self._base),
            read_bufsize=1 << 20,
            raise_for_status=raise_refused_upgrade,
            skip_auto_headers=("User-Agent",),
            trace_configs=[*traces],
        )
        self._sessions.append(session)
        return session

    def _namespace_of(self, obj: Object, namespace: str) -> str:
        return namespace or obj["metadata"].get("namespace") or self.namespace

    async def _list_leniently(
        self, selection: Selection, type_: Any
    ) -> tuple[builtins.list[Any], str]:
        items: builtins.list[Any] = []
        version = ""
        async for page in self._pages(selection):
            version = page.metadata.resource_version
            decoded = (decode_leniently(selection.resource, raw, type_) for raw in page.items or ())
            items += [item for item in decoded if item is not None]
        return items, version

    async def _pages(self, selection: Selection, accept: str = "") -> AsyncIterator[Page]:
        path = selection.resource.path(selection.namespace)
        query = {"limit": str(LIST_PAGE_MAX_ITEMS)} | selection.query()
        while True:
            body = await self._call("GET", path, query, accept=accept, timeout_s=LIST_TIMEOUT_S)
            page = decode(body, Page)
            yield page
            if not page.metadata.continue_:
                return
            query["continue"] = page.metadata.continue_

    def _events(self, selection: Selection, version: str) -> AsyncGenerator[RawEvent, None]:
        get = partial(self._send, "GET")
        return watch_events(get, self._credentials.renew, selection, version)

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
                if response.status == 401 and await self._credentials.renew():
                    again = await self._send(
                        method, path, query, data, content_type, timeout, accept
                    )
                    async with again:
                        response, answer = again, await again.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if method != "GET":
                self._recheck()
            raise no_response(method, path, error) from error
        if response.status >= 400:
            raise api_error(response, answer)
        return answer

    def _recheck(self) -> None:
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
                    protocols=(PROTOCOL_V4,),
                    headers=await self._headers(),
                    timeout=aiohttp.ClientWSTimeout(ws_close=EXEC_CLOSE_TIMEOUT_S),
                    max_msg_size=EXEC_MESSAGE_MAX_BYTES,
                    **self._options,
                )
                return messages
            except ApiError as error:
                if error.status != 401 or not await self._credentials.renew():
                    raise

    async def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json", "User-Agent": "kubeai"}
        authorization = await self._credentials.authorization()
        if authorization:
            headers["Authorization"] = authorization
        return headers
