"""The console's HTTP application: the page, its API, and the checks of changes.

The supervisor serves it on a Unix socket that only its own workers can reach (:class:`Console`).
The workers have checked who the client is (gateway/console.py). What changes something must have a
header that no other site can make a browser send, and a body of a type that no form has.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from aiohttp import web

import kubeai
from kubeai.errors import KubeAIError, quoted
from kubeai.http_errors import error_middleware
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.logs import get_logger
from kubeai.openai.errors import ErrorResponse, model_not_found
from kubeai.operator.view import ModelView
from kubeai.podspec import SERVER_CONTAINER
from kubeai.supervisor.console.actions import Actions, refusal
from kubeai.supervisor.console.events import Hub
from kubeai.supervisor.console.state import Fleet, State, Worker
from kubeai.supervisor.console.traffic import Traffic
from kubeai.supervisor.console.usage import read_table

log = get_logger(__name__)

STATIC = Path(__file__).parent / "static"
MANIFESTS_MAX_BYTES = 2 << 20
LOGS_MAX = 16  # that are followed at a time
LOG_LINES_DEFAULT, LOG_LINES_MAX = 200, 10_000
HEAD_MAX_BYTES = 64 << 10  # of a request, and of each of its lines
CHANGE_HEADER = "X-KubeAI-UI"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class _Scale(msgspec.Struct, forbid_unknown_fields=True):
    """The body of a request to scale a Model."""

    replicas: int


class Console:
    """The application and its socket. ``path``: of the socket, for the workers.

    ``workers``, ``stream_problems`` and ``synced`` are called for each state.

    ``local``: on one machine. ``keys``: clients need an API key.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        fleet: Fleet,
        traffic: Traffic,
        workers: Callable[[], Iterable[Worker]],
        stream_problems: Callable[[], list[str]],
        synced: Callable[[], bool],
        *,
        local: bool,
        keys: bool = False,
    ) -> None:
        """KubeAIError if no socket can be created."""
        self._kube = kube
        self._namespace = namespace
        self._fleet = fleet
        self._traffic = traffic
        self._workers = workers
        self._stream_problems = stream_problems
        self._synced = synced
        self._local = local
        self._keys = keys
        self._actions = Actions(kube, namespace, local=local)
        self._hub = Hub(self.state, traffic)
        self._logs: set[asyncio.Task[object]] = set()
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._runner: web.AppRunner | None = None
        self._socket = self._listen()

    @property
    def path(self) -> str:
        """The path of the Unix socket."""
        assert self._directory is not None, "the socket exists"
        return os.path.join(self._directory.name, "console")

    # -- lifecycle -------------------------------------------------------------------------------

    def _listen(self) -> socket.socket:
        """A socket in a directory that only this user can enter."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            # Also removed at exit, if KubeAI does not start.
            self._directory = tempfile.TemporaryDirectory(
                prefix="kubeai-", ignore_cleanup_errors=True
            )
            sock.bind(self.path)
            os.chmod(self.path, 0o600)
        except OSError as error:
            sock.close()
            self._remove()
            reason = error.strerror or error
            raise KubeAIError(
                f"gateway.ui: cannot create a socket in {tempfile.gettempdir()}: {reason}; set "
                "TMPDIR to a directory that is writable and has a short path"
            ) from None
        return sock

    def _remove(self) -> None:
        if self._directory is not None:
            self._directory.cleanup()

    async def start(self) -> None:
        """Accept connections."""
        self._runner = web.AppRunner(
            self.make_app(),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=0.5,
            auto_decompress=False,
            max_line_size=HEAD_MAX_BYTES,
            max_field_size=HEAD_MAX_BYTES,
        )
        await self._runner.setup()
        await web.SockSite(self._runner, self._socket).start()

    async def stop(self) -> None:
        """End all streams, so that no worker waits for them when it drains."""
        await self._hub.close()
        for task in self._logs:
            task.cancel()

    async def close(self) -> None:
        """Stop, close all connections and remove the socket."""
        await self.stop()
        if self._runner is not None:
            await self._runner.cleanup()
        self._socket.close()
        self._remove()

    def make_app(self) -> web.Application:
        """The application, without a server."""
        internal = ErrorResponse("Internal error in the supervisor. See its log.", status=500)
        app = web.Application(
            middlewares=[error_middleware(_refuse, internal)], client_max_size=MANIFESTS_MAX_BYTES
        )
        app.on_response_prepare.append(_add_headers)
        add = app.router.add_route
        add("GET", "/ui", _redirect)
        add("GET", "/ui/", _page)
        add("GET", "/ui/api/events", self._hub.stream)
        add("GET", "/ui/api/state", self._get_state)
        add("GET", "/ui/api/usage", self._get_usage)
        add("POST", "/ui/api/apply", self._apply)
        add("GET", "/ui/api/models/{name}", self._get_model)
        add("DELETE", "/ui/api/models/{name}", self._delete)
        add("POST", "/ui/api/models/{name}/scale", self._scale)
        add("GET", "/ui/api/models/{name}/log", self._follow_log)
        app.router.add_static("/ui/static/", STATIC)
        return app

    # -- reading ---------------------------------------------------------------------------------

    async def state(self) -> State:
        """The state now."""
        self._traffic.read()
        return State(
            version=kubeai.__version__,
            time_s=time.time(),
            local=self._local,
            namespace=self._namespace,
            synced=self._synced(),
            can=await self._actions.can(),
            workers=list(self._workers()),
            stream_problems=self._stream_problems(),
            models=self._fleet.models(),
            keys=self._keys,
        )

    async def _get_state(self, _: web.Request) -> web.Response:
        return _json(await self.state())

    async def _get_usage(self, request: web.Request) -> web.Response:
        by = request.query.get("by", "")
        return _json(await read_table(self._kube, self._namespace, by))

    async def _get_model(self, request: web.Request) -> web.Response:
        view = self._view(request)
        manifest = await self._actions.manifest(view.name)
        self._traffic.read()
        return _json(self._fleet.details(view, manifest))

    def _view(self, request: web.Request) -> ModelView:
        name = request.match_info["name"]
        view = self._fleet.model(name)
        if view is None:
            raise model_not_found(name)
        return view

    async def _follow_log(self, request: web.Request) -> web.StreamResponse:
        view, lines = self._view(request), _lines(request.query.get("tail", ""))
        pods = {pod.name: pod for pod in view.pods}
        newest = max(view.pods, key=lambda pod: pod.created_s, default=None)
        name = request.query.get("pod") or (newest.name if newest is not None else "")
        if not name:
            raise ErrorResponse(f"The Model {quoted(view.name)} has no replica.", status=409)
        if name not in pods:
            message = f"The Model {quoted(view.name)} has no replica {quoted(name)}."
            raise ErrorResponse(message, status=409)
        if len(self._logs) >= LOGS_MAX:
            raise ErrorResponse(f"More than {LOGS_MAX} logs are followed.", status=503)
        task = asyncio.current_task()
        assert task is not None
        self._logs.add(task)
        try:
            return await self._copy_log(request, name, lines)
        finally:
            self._logs.discard(task)

    async def _copy_log(self, request: web.Request, pod: str, lines: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        try:
            async with self._kube.log(
                pod, container=SERVER_CONTAINER, namespace=self._namespace, tail_lines=lines
            ) as blocks:
                await response.prepare(request)
                async for block in blocks:
                    await response.write(block)
        except ApiError as error:
            if response.prepared:  # the API has ended it: so do we
                return response
            if error.status in (400, 404):  # the container has not started, or the pod is gone
                raise ErrorResponse(str(error), status=409) from error
            raise refusal(error) from error
        return response

    # -- changes ---------------------------------------------------------------------------------

    async def _scale(self, request: web.Request) -> web.Response:
        _check_change(request, "application/json")
        view = self._view(request)
        try:
            wanted = msgspec.json.decode(await request.read(), type=_Scale)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ErrorResponse(f"Invalid body: {error}.", status=422) from None
        if wanted.replicas < 0:
            raise ErrorResponse("replicas: must not be negative", status=422)
        await self._actions.scale(view, wanted.replicas)
        log.info("model scaled in the console", model=view.name, replicas=wanted.replicas)
        return _json({"replicas": wanted.replicas})

    async def _apply(self, request: web.Request) -> web.Response:
        _check_change(request, "application/yaml")
        try:
            text = (await request.read()).decode()
        except UnicodeDecodeError:
            raise ErrorResponse("The manifests are not UTF-8.", status=422) from None
        applied = await self._actions.apply(text)
        log.info("models applied in the console", models=applied)
        return _json({"applied": applied})

    async def _delete(self, request: web.Request) -> web.Response:
        _check_change(request)
        view = self._view(request)
        await self._actions.delete(view.name)
        log.info("model deleted in the console", model=view.name)
        return _json({"deleted": view.name})


def _check_change(request: web.Request, content_type: str = "") -> None:
    """ErrorResponse unless the request comes from the console's page.

    ``content_type``: the required type of the body, if it has one.
    """
    if request.headers.get(CHANGE_HEADER) != "1":
        message = f"Changes need the header {CHANGE_HEADER}: 1."
        raise ErrorResponse(message, status=403, code="missing_header")
    if content_type and request.content_type != content_type:
        raise ErrorResponse(f"The Content-Type must be {content_type}.", status=415)
    if request.headers.get("Content-Encoding", "identity") not in ("", "identity"):
        raise ErrorResponse(
            "Compressed bodies are not supported here. Send the body uncompressed.",
            param="Content-Encoding",
            status=415,
        )


def _lines(text: str) -> int:
    if not text:
        return LOG_LINES_DEFAULT
    if not text.isdecimal():
        raise ErrorResponse(f"tail: {quoted(text)} is not a number of lines", status=422)
    return min(int(text[:9]), LOG_LINES_MAX)


# -- responses -------------------------------------------------------------------------------------


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


async def _redirect(_: web.Request) -> web.Response:
    return web.Response(status=307, headers={"Location": "/ui/"})


async def _page(_: web.Request) -> web.FileResponse:
    return web.FileResponse(STATIC / "index.html")


async def _add_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
    is_api = request.path.startswith("/ui/api/")
    response.headers["Cache-Control"] = "no-store" if is_api else "no-cache"
    response.headers.pop("Server", None)


def _refuse(_: web.Request, error: ErrorResponse) -> web.Response:
    return web.Response(body=error.body(), status=error.status, content_type="application/json")
