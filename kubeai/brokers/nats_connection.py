"""A connection to a NATS server, which ends at the first fault.

Wraps nats-py's client. The library's own reconnection is off, and each of its operations runs in a
task of its own, for two reasons: an operation on a silent server has to end within ``TIMEOUT_S``,
which the library does not promise, and a cancelled one may break the library's read loop. Used by
``nats_core.py`` and ``nats_jetstream.py``.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import nats.errors
from nats.aio.client import Client

from kubeai.brokers.base import TIMEOUT_S, BrokerUnavailable
from kubeai.brokers.urls import BrokerUrl

T = TypeVar("T")

CONNECT_TIMEOUT_S = 10  # per server
PING_INTERVAL_S = 8
PINGS_UNANSWERED_MAX_COUNT = 2  # a silent server is noticed after 24 s
RTT_TIMEOUT_S = int(TIMEOUT_S)
WATCH_INTERVAL_S = 1.0
CLOSE_TIMEOUT_S = 5.0
SERVER_URL = "NATS_SERVER_URL"
_SCHEMES = ("nats", "tls", "ws", "wss")


class Settings(NamedTuple):
    """How to connect. Paths are of files; all but ``servers`` may be empty."""

    servers: list[str]  # URLs without credentials
    user: str
    password: str
    token: str
    credentials: str  # NATS_CREDS: a user's JWT and its NKey seed
    ca: str  # NATS_CA, instead of the system's
    certificate: str  # NATS_CERT and NATS_KEY: of the client
    key: str

    @property
    def addresses(self) -> str:
        """The servers for messages."""
        return ", ".join(self.servers)


def read_settings(url: BrokerUrl) -> Settings:
    """The settings in the environment. ConfigError if a variable is missing or invalid."""
    servers: list[str] = []
    login: tuple[str | None, str | None] = (None, None)
    for text in url.variable(SERVER_URL).split(","):
        try:
            parts = urlsplit(text if "://" in text else f"nats://{text.strip()}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or parts.scheme.strip() not in _SCHEMES:
            problem = f"a URL of the form nats://host:port ({', '.join(_SCHEMES)})"
            raise url.error(f"needs {problem} in the environment variable {SERVER_URL}")
        address = f"[{host}]" if ":" in host else host
        if port or parts.scheme in ("nats", "tls"):
            address = f"{address}:{port or 4222}"
        servers.append(f"{parts.scheme.strip()}://{address}{parts.path.rstrip('/')}")
        if parts.username and login[0] is None:
            login = unquote(parts.username), parts.password and unquote(parts.password)
    user, password = login
    with_password = password is not None
    get = url.environment.get
    settings = Settings(
        servers,
        user=user or "" if with_password else "",
        password=password or "",
        token="" if with_password else user or "",
        credentials=get("NATS_CREDS", ""),
        ca=get("NATS_CA", ""),
        certificate=get("NATS_CERT", ""),
        key=get("NATS_KEY", ""),
    )
    if bool(settings.certificate) != bool(settings.key):
        raise url.error("needs both or neither of the environment variables NATS_CERT and NATS_KEY")
    return settings


class Connection:
    """A connected client. After the first fault, ``check`` and ``run`` raise BrokerUnavailable."""

    def __init__(self, settings: Settings) -> None:
        self.client = Client()
        self.refusals: list[str] = []  # of the server's permissions, the latest one only
        self.dropped = 0  # messages that did not fit into a subscription's queue
        self._settings = settings
        self._reason = ""
        self._ended = asyncio.get_running_loop().create_future()
        self._callbacks: list[Callable[[], None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    @classmethod
    async def open(cls, settings: Settings) -> Connection:
        """Connect. BrokerUnavailable if no server answers, or the one that does refuses."""
        connection = cls(settings)
        try:
            await connection.run("connect", connection._connect())
        except BaseException:
            await connection.close()
            raise
        connection._start(connection._watch())
        return connection

    async def _connect(self) -> None:
        settings = self._settings
        options: dict[str, Any] = {}
        if settings.ca or settings.certificate:
            context = ssl.create_default_context(cafile=settings.ca or None)
            if settings.certificate:
                context.load_cert_chain(settings.certificate, settings.key)
            options["tls"] = context
        if settings.user:
            options |= {"user": self._once_encrypted(settings.user), "password": settings.password}
        if settings.token:
            options["token"] = self._once_encrypted(settings.token)
        if settings.credentials:
            options["user_credentials"] = settings.credentials
        try:
            await self.client.connect(
                servers=settings.servers,
                name="kubeai",
                allow_reconnect=False,
                max_reconnect_attempts=1,  # of each server, while connecting
                reconnect_time_wait=0,
                connect_timeout=CONNECT_TIMEOUT_S,
                ping_interval=PING_INTERVAL_S,
                max_outstanding_pings=PINGS_UNANSWERED_MAX_COUNT,
                error_cb=self._on_error,
                disconnected_cb=self._on_end,
                closed_cb=self._on_end,
                **options,
            )
        except nats.errors.NoServersError:
            raise self.client.last_error or nats.errors.NoServersError() from None
        self._require_tls()

    def _once_encrypted(self, credential: str) -> Callable[[], str]:
        """nats-py asks for a credential after the TLS handshake, before it sends it."""

        def get() -> str:
            self._require_tls()
            return credential

        return get

    def _require_tls(self) -> None:
        """nats-py encrypts only if the server asks for it, even if the URL is ``tls://``."""
        required = any(server.startswith("tls:") for server in self._settings.servers)
        if required and not self.client._server_info.get("tls_required"):
            raise nats.errors.Error("the server does not support TLS")

    def check(self) -> None:
        """BrokerUnavailable if the connection has ended."""
        if self._reason:
            raise self._error(self._reason)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the connection has ended."""
        self._callbacks.append(callback)

    async def run(
        self, what: str, operation: Coroutine[Any, Any, T], raises: tuple[type[Exception], ...] = ()
    ) -> T:
        """Run an operation of the library. BrokerUnavailable if it fails, or does not end in time.

        Errors in ``raises`` are raised as they are. If the caller is cancelled, the operation
        goes on.
        """
        if self._reason:
            operation.close()
        self.check()
        task = self._start(operation)
        await asyncio.wait(
            (task, self._ended), timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        if not task.done():
            self.end(f"no answer within {TIMEOUT_S:g} s")
            raise self._error(f"{what}: {self._reason}")
        try:
            return task.result()
        except raises:
            raise
        except (nats.errors.Error, OSError, ValueError) as error:  # TimeoutError is an OSError
            raise self._error(f"{what}: {_text_of(error)}") from None
        except asyncio.CancelledError:  # by nats-py, when it closes a subscription
            raise self._error(f"{what}: {self._reason or 'cancelled'}") from None

    def _start(self, operation: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(operation)
        self._tasks.add(task)
        task.add_done_callback(self._discard)
        return task

    def _discard(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may wait for it any more

    def end(self, reason: str) -> None:
        """Mark the connection as ended. Only the first call has an effect."""
        if self._reason:
            return
        self._reason = reason
        self._ended.set_result(None)
        for callback in self._callbacks:
            callback()

    async def close(self) -> None:
        """Close the connection. Does not raise."""
        self.end("the connection is closed")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        closing = asyncio.create_task(self.client.close())
        tasks.append(closing)
        await asyncio.wait(tasks, timeout=CLOSE_TIMEOUT_S)
        for task in tasks:
            task.cancel()
        transport = self.client._transport
        if (writer := getattr(transport, "_io_writer", None)) is not None:
            writer.transport.abort()  # a silent server would keep it open with what is unsent
        await asyncio.gather(*tasks, return_exceptions=True)

    # Called by nats-py

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self.dropped += 1
        elif "permissions violation" in str(error).lower():
            self.refusals = [str(error)]
        elif isinstance(error, nats.errors.UnexpectedEOF):
            self.end("the server has closed the connection")

    async def _on_end(self) -> None:
        self.end(_text_of(self.client.last_error) if self.client.last_error else "disconnected")

    async def _watch(self) -> None:
        """Notice that nats-py has given up: it calls back only after its socket is closed."""
        while self.client.is_connected:  # noqa: ASYNC110  # nats-py sets no event
            await asyncio.sleep(WATCH_INTERVAL_S)
        await self._on_end()

    def _error(self, problem: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"NATS at {self._settings.addresses}: {problem}")


def _text_of(error: BaseException) -> str:
    text = str(error).removeprefix("nats: ")
    if not text or isinstance(error, TimeoutError):
        return "timed out" if isinstance(error, TimeoutError) else type(error).__name__
    return text
