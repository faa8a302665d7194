"""HTTP requests to a gateway, with errors that say what to do. Used by the other modules here."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from kubeai.errors import KubeAIError, quoted
from kubeai.openai.credentials import authorization

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0  # between two pieces of an answer; an engine may take long for a prompt
LINE_MAX_BYTES = 1 << 20
BODY_MAX_BYTES = 16 << 20
MESSAGE_MAX_CHARS = 500
NAMES_MAX = 20  # models listed in an error
STATE_PATH = "/ui/api/state"


class Gateway:
    """A gateway's API. Use it as a context manager; methods raise KubeAIError."""

    def __init__(self, base_url: str, api_key: str = "") -> None:
        """``base_url``: of the OpenAI API, like ``http://127.0.0.1:8000/openai/v1``."""
        self.base_url = base_url.rstrip("/")
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise KubeAIError(
                f"--base-url: {quoted(base_url)} is not an http:// or https:// URL, such as "
                f"http://127.0.0.1:8000/openai/v1"
            )
        self.origin = f"{parts.scheme}://{parts.netloc}"
        self._is_local = _is_loopback(parts.hostname)
        self._headers = authorization(api_key)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Gateway:
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
            ),
            read_bufsize=LINE_MAX_BYTES,
            trust_env=not self._is_local,  # a proxy cannot reach this machine's loopback
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    @contextlib.asynccontextmanager
    async def request(
        self, method: str, url: str, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response to a request, with any status; KubeAIError if there is none."""
        assert self._session is not None
        try:
            async with self._session.request(method, url, **options) as response:
                yield response
        except aiohttp.ClientConnectionError as error:
            if isinstance(error, aiohttp.ServerDisconnectedError):
                raise KubeAIError(f"{self.origin} closed the connection") from None
            raise KubeAIError(self._unreachable(error)) from None
        except (aiohttp.ClientError, TimeoutError) as error:
            what = str(error) or type(error).__name__
            raise KubeAIError(f"{self.origin}: the response ended early: {what}") from None

    def _unreachable(self, error: Exception) -> str:
        number = getattr(getattr(error, "os_error", None), "errno", None) or 0
        # asyncio's own text repeats the address; errors of name lookups have negative numbers.
        why = os.strerror(number) if number > 0 else str(error) or type(error).__name__
        start = "Start one with `kubeai local`, or name another with" if self._is_local else "Check"
        return f"no gateway can be reached at {self.origin} ({why}). {start} --base-url"

    async def models(self) -> list[str]:
        """The names of the models that the gateway serves; empty if it does not list them."""
        with contextlib.suppress(KubeAIError, msgspec.DecodeError, KeyError, TypeError):
            async with self.request("GET", f"{self.base_url}/models") as response:
                body = msgspec.json.decode(await response.content.read(BODY_MAX_BYTES))
                return sorted(str(model["id"]) for model in body["data"])
        return []

    async def state(self) -> dict[str, Any]:
        """The gateway's Models, as ``GET /ui/api/state`` returns them."""
        async with self.request("GET", self.origin + STATE_PATH) as response:
            body = await response.read()
            if response.status == 404:
                raise KubeAIError(
                    f"{self.origin} has no console, which this command reads. Set "
                    f"gateway.ui.enabled in the system config, or check --base-url"
                )
            if response.status != 200:
                raise KubeAIError(f"{self.origin}{STATE_PATH}: {error_text(response, body)}")
        try:
            return msgspec.json.decode(body, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise KubeAIError(f"{self.origin}{STATE_PATH}: not JSON: {error}") from None

    async def check_model(self, name: str, response: aiohttp.ClientResponse, body: bytes) -> None:
        """Raise KubeAIError for an error response to a request for a model."""
        text = error_text(response, body)
        if response.status != 404:
            raise KubeAIError(text)
        models = await self.models()
        if not models:
            raise KubeAIError(f"--base-url {self.base_url}: {text}")
        listed = ", ".join(models[:NAMES_MAX]) + (", …" if len(models) > NAMES_MAX else "")
        raise KubeAIError(f"there is no model {quoted(name)}; there are: {listed}")


def error_text(response: aiohttp.ClientResponse, body: bytes) -> str:
    """The message of an error response, in OpenAI's format or not, and its status."""
    try:
        message = msgspec.json.decode(body)["error"]["message"]
    except (msgspec.DecodeError, KeyError, TypeError):
        message = body.decode(errors="replace").strip() or response.reason
    hint = ". Give a key with KUBEAI_API_KEY or --api-key" if response.status == 401 else ""
    return f"{str(message)[:MESSAGE_MAX_CHARS]} (HTTP status {response.status}){hint}"


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
