"""Container probes: single attempts, and the three probe loops.

Owns how an attempt is made (httpGet, tcpSocket, exec) and counted. The runner calls it and acts on
the results.

A probe's period does not delay cold starts: until a container has first been up, an attempt that
fails with connection refused or 503 is retried every ``EAGER_RETRY_S`` until its period is over,
and only then counts as one failure.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

import aiohttp
from yarl import URL

from kubeai.local.kubelet.pods.pod import HTTPGet, PodError, Probe, TCPSocket
from kubeai.local.kubelet.runtime.command import ExecResult

EAGER_RETRY_S = 0.1
OUTPUT_MAX_CHARS = 512


class ProbeResult(Enum):
    """The result of one attempt."""

    SUCCESS = auto()
    FAILURE = auto()
    NOT_YET = auto()  # a failure that may resolve itself soon


Attempt = tuple[ProbeResult, str]  # with a message


class ProbedContainer(Protocol):
    """The probed container."""

    ip: str

    def port(self, wanted: int | str) -> int:
        """Resolve a port number or name."""

    async def exec(self, command: tuple[str, ...], timeout_s: float) -> ExecResult:
        """Run a command in the container; TimeoutError after ``timeout_s``."""


class Prober:
    """Makes attempts; one per kubelet. Call ``close`` at the end."""

    def __init__(self) -> None:
        unverified = ssl.create_default_context()
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        # A new connection each time: probes also check that one can connect.
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=unverified)
        self._session = aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
        )

    async def close(self) -> None:
        """Close the HTTP session."""
        await self._session.close()

    async def attempt(self, probe: Probe, container: ProbedContainer) -> Attempt:
        """Make one attempt of a probe. Never raises: a failure has a message."""
        timeout_s = max(1, probe.timeout_seconds)
        try:
            if probe.http_get is not None:
                return await self.http(probe.http_get, container, timeout_s)
            if probe.tcp_socket is not None:
                return await _tcp(probe.tcp_socket, container, timeout_s)
            if probe.exec is not None:
                executed = await container.exec(probe.exec.command, timeout_s)
                result = ProbeResult.FAILURE if executed.code else ProbeResult.SUCCESS
                return result, executed.output.strip()[:OUTPUT_MAX_CHARS]
        except TimeoutError:
            return ProbeResult.FAILURE, f"no response within {timeout_s} s"
        except (PodError, ValueError) as error:  # no such port, not a URL
            return ProbeResult.FAILURE, str(error)
        return (
            ProbeResult.FAILURE,
            "unsupported kind of probe (supported: httpGet, tcpSocket, exec)",
        )

    async def http(self, action: HTTPGet, container: ProbedContainer, timeout_s: float) -> Attempt:
        """One GET; 200–399 is success, redirects are not followed."""
        host = action.host or container.ip
        scheme = action.scheme.lower() or "http"
        path = action.path if action.path.startswith("/") else f"/{action.path}"
        url = URL(f"{scheme}://{host}:{container.port(action.port)}{path}", encoded=True)
        headers = {"User-Agent": "kube-probe/kubeai", "Accept": "*/*"}
        headers |= {header.name: header.value for header in action.http_headers}
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._session.get(url, headers=headers, allow_redirects=False)
                response.close()
        except (aiohttp.ClientConnectorError, ConnectionError) as error:
            return _refused(error), f"GET {url}: {error}"
        except aiohttp.ClientError as error:
            return ProbeResult.FAILURE, f"GET {url}: {error or type(error).__name__}"
        if 200 <= response.status < 400:
            return ProbeResult.SUCCESS, ""
        result = ProbeResult.NOT_YET if response.status == 503 else ProbeResult.FAILURE
        return result, f"GET {url}: HTTP status {response.status}"


async def _tcp(action: TCPSocket, container: ProbedContainer, timeout_s: float) -> Attempt:
    host, port = action.host or container.ip, container.port(action.port)
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        return _refused(error), f"connect to {host}:{port}: {error.strerror}"
    writer.close()
    return ProbeResult.SUCCESS, ""


def _refused(error: OSError | aiohttp.ClientError) -> ProbeResult:
    number = getattr(error, "errno", None)
    return ProbeResult.NOT_YET if number == errno.ECONNREFUSED else ProbeResult.FAILURE


class Loops:
    """One container's probe loops. ``started`` is its start time on the event loop's clock.

    Each loop awaits ``make(probe)`` for an attempt, so that tests can provide attempts.
    """

    def __init__(self, make: MakeAttempt, started: float) -> None:
        self._make = make
        self._started = started
        self._clock = asyncio.get_running_loop().time

    async def startup(self, probe: Probe) -> str | None:
        """Run until the probe succeeds (None) or fails ``failureThreshold`` times (its message)."""
        await self._initial_delay(probe)
        return await self._until_failed(probe, eager=True, stop_at_success=True)

    async def liveness(self, probe: Probe) -> str:
        """Run until ``failureThreshold`` consecutive failures; returns the last one's message."""
        await self._initial_delay(probe)
        return await self._until_failed(probe, eager=False, stop_at_success=False) or ""

    async def readiness(self, probe: Probe, report: Callable[[bool, str], None]) -> None:
        """Run forever; calls ``report`` on each change, starting from not ready."""
        await self._initial_delay(probe)
        ready = False
        was_ready = False
        in_a_row = 0
        last: bool | None = None
        while True:
            began = self._clock()
            result, message = await self._attempt(probe, eager=not was_ready)
            success = result is ProbeResult.SUCCESS
            in_a_row = in_a_row + 1 if success is last else 1
            last = success
            needed = probe.success_threshold if success else probe.failure_threshold
            if success is not ready and in_a_row >= needed:
                ready = success
                was_ready = was_ready or ready
                report(ready, message)
            await self._next_period(probe, began)

    async def _until_failed(
        self, probe: Probe, *, eager: bool, stop_at_success: bool
    ) -> str | None:
        failures = 0
        while True:
            began = self._clock()
            result, message = await self._attempt(probe, eager=eager)
            if result is ProbeResult.SUCCESS:
                failures = 0
                if stop_at_success:
                    return None
            else:
                failures += 1
                if failures >= max(1, probe.failure_threshold):
                    return message
            await self._next_period(probe, began)

    async def _attempt(self, probe: Probe, *, eager: bool) -> Attempt:
        period_over = self._clock() + max(1, probe.period_seconds)
        while True:
            attempt = await self._make(probe)
            retry = eager and attempt[0] is ProbeResult.NOT_YET
            if not retry or self._clock() + EAGER_RETRY_S >= period_over:
                return attempt
            await asyncio.sleep(EAGER_RETRY_S)

    async def _initial_delay(self, probe: Probe) -> None:
        await asyncio.sleep(max(0.0, self._started + probe.initial_delay_seconds - self._clock()))

    async def _next_period(self, probe: Probe, began: float) -> None:
        period_s = max(1, probe.period_seconds)
        await asyncio.sleep(max(0.0, began + period_s - self._clock()))


class MakeAttempt(Protocol):
    """Makes one attempt of a probe."""

    async def __call__(self, probe: Probe) -> Attempt:
        """Make one attempt."""
