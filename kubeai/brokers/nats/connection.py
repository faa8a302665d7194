"""A connection to a NATS server, which ends at the first fault.

Wraps nats-py's client, without the library's own reconnection. Its operations run in a
:class:`~kubeai.brokers.lifetime.Lifetime`: a cancelled PING breaks the library's read loop. Used by
``core.py`` and ``jetstream.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import nats.errors
from nats.aio.client import Client
from nats.aio.subscription import Subscription

from kubeai.brokers.base import TIMEOUT_S, BrokerUnavailable
from kubeai.brokers.lifetime import Lifetime, text_of
from kubeai.brokers.urls import BrokerUrl

CONNECT_TIMEOUT_S = 10  # per server
PING_INTERVAL_S = 8
PINGS_UNANSWERED_MAX_COUNT = 2  # a silent server is noticed after 24 s
RTT_TIMEOUT_S = int(TIMEOUT_S)
WATCH_INTERVAL_S = 1.0
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
    """A connected client, and the lifetime of its connection."""

    def __init__(self, settings: Settings) -> None:
        self.client = Client()
        addresses = ", ".join(settings.servers)
        self.lifetime = Lifetime(f"NATS at {addresses}", (nats.errors.Error,))
        self._last_error: Exception | None = None
        self._settings = settings

    @classmethod
    async def open(cls, settings: Settings) -> Connection:
        """Connect. BrokerUnavailable if no server answers, or the one that does refuses."""
        self = cls(settings)
        try:
            await self.lifetime.run("connect", self._connect())
        except BaseException:
            self.lifetime.end("it has not been opened")
            await self.close()
            raise
        self.lifetime.start(self._watch())
        return self

    async def _connect(self) -> None:
        try:
            await self.client.connect(
                servers=self._settings.servers,
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
                **self._options(),
            )
        except nats.errors.NoServersError as error:
            raise self._last_error or error from None
        # nats-py waits for none of these. They fail if the socket fails again when it is closed.
        for task in (self.client._flusher_task, self.client._reading_task):
            assert task is not None, "it is connected"
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._require_tls()

    def _options(self) -> dict[str, Any]:
        settings = self._settings
        options: dict[str, Any] = {}
        if settings.ca or settings.certificate:
            context = ssl.create_default_context(cafile=settings.ca or None)
            if settings.certificate:
                context.load_cert_chain(settings.certificate, settings.key)
            options["tls"] = context
        if settings.user:
            options["user"] = self._once_encrypted(settings.user)
            options["password"] = settings.password
        if settings.token:
            options["token"] = self._once_encrypted(settings.token)
        if settings.credentials:
            options["user_credentials"] = settings.credentials
        return options

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

    async def flush(self) -> None:
        """Wait until the server has processed all that was sent. To be run in the lifetime.

        BrokerUnavailable if the server has refused any of it.
        nats-py queues commands, and its ``flush`` and ``rtt`` send a PING ahead of them, so that
        its answer confirms nothing.
        """
        await self.client._flush_pending(force_flush=True)
        await self.client.rtt(RTT_TIMEOUT_S)
        self.lifetime.check()

    async def drain(self, subscription: Subscription) -> None:
        """Unsubscribe, and wait until what the server had sent has been received."""
        with contextlib.suppress(BrokerUnavailable):
            await self.lifetime.run("unsubscribe", self._drain(subscription))

    async def _drain(self, subscription: Subscription) -> None:
        await self.client._send_unsubscribe(subscription._id)
        await self.flush()
        await subscription.drain()  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Close the connection. Does not raise."""
        try:
            await self.lifetime.close(self.client.close(), self._abort)
        finally:  # also if the caller is cancelled
            # nats-py ends its subscriptions last, and not at all if its socket has failed by then.
            for subscription in self.client._subs.values():
                subscription._stop_processing()

    def _abort(self) -> None:
        """Close the socket; a silent server would keep it open as long as anything is unsent."""
        writer = getattr(self.client._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    # Called by nats-py

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        if "permissions violation" in str(error).lower():
            self.lifetime.end(text_of(error))
        elif isinstance(error, nats.errors.UnexpectedEOF):
            self.lifetime.end("the server has closed the connection")

    async def _on_end(self) -> None:
        error = self.client.last_error
        self.lifetime.end(text_of(error) if error else "disconnected")

    async def _watch(self) -> None:
        """Notice that nats-py has given up: it calls back only after its socket is closed."""
        while self.client.is_connected:  # noqa: ASYNC110  # nats-py sets no event
            await asyncio.sleep(WATCH_INTERVAL_S)
        await self._on_end()
