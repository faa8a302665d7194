"""Kubernetes' channel protocol for ``exec`` over a WebSocket, and the client's side of it.

Every binary message is one byte with the channel's number, followed by data for that channel. The
server streams STDOUT and STDERR and finally sends one message on ERROR: a JSON Status with the
command's outcome. The client may send STDIN; in version 5 it may also close it with a message of
two bytes, CLOSE and the channel's number.

Used by the client, the embedded API and the process kubelet.
"""

from __future__ import annotations

from typing import NamedTuple

import aiohttp
import msgspec

from kubeai.kube.errors import ApiError, api_error

EXEC_OUTPUT_MAX_BYTES = 64 << 10  # the tail of a command's output that is kept
PROTOCOL_V4, PROTOCOL_V5 = "v4.channel.k8s.io", "v5.channel.k8s.io"
STDIN, STDOUT, STDERR, ERROR, CLOSE = 0, 1, 2, 3, 255
_NON_ZERO, _EXIT_CODE = "NonZeroExitCode", "ExitCode"


class _Cause(msgspec.Struct, omit_defaults=True):
    reason: str = ""
    message: str = ""


class _Details(msgspec.Struct, omit_defaults=True):
    causes: list[_Cause] | None = None


class _Status(msgspec.Struct, omit_defaults=True):
    kind: str = ""
    apiVersion: str = ""
    metadata: dict[str, str] = {}
    status: str = ""
    message: str = ""
    reason: str = ""
    details: _Details | None = None
    code: int = 0


class Ending(NamedTuple):
    """How a command ended. Without an exit code, the Status that says why it did not run."""

    exit_code: int | None
    status: int = 0
    reason: str = ""
    message: str = ""

    def encode(self) -> bytes:
        """The message on the ERROR channel, without the channel's number."""
        status = _Status(kind="Status", apiVersion="v1", metadata={}, status="Failure")
        if self.exit_code == 0:
            status.status = "Success"
        elif self.exit_code is not None:
            status.reason = _NON_ZERO
            status.message = f"command terminated with exit code {self.exit_code}"
            status.details = _Details([_Cause(_EXIT_CODE, str(self.exit_code))])
        else:
            status.reason, status.message, status.code = self.reason, self.message, self.status
        return msgspec.json.encode(status)

    @classmethod
    def decode(cls, data: bytes) -> Ending:
        """Read a message from the ERROR channel. ValueError if it is not a Status."""
        status = msgspec.json.decode(data, type=_Status)
        if status.status == "Success":
            return cls(0)
        causes = (status.details.causes if status.details else None) or ()
        for cause in causes:
            if status.reason == _NON_ZERO and cause.reason == _EXIT_CODE:
                return cls(int(cause.message))
        return cls(None, status.code or 500, status.reason, status.message)


class ExecResult(NamedTuple):
    """Result of a command in a container; ``output`` is the tail of its stdout and stderr."""

    exit_code: int
    output: str


async def command_result(messages: aiohttp.ClientWebSocketResponse) -> ExecResult:
    """Read an exec's channels until the command's status arrives."""
    output = bytearray()
    async for message in messages:
        if message.type is not aiohttp.WSMsgType.BINARY or len(message.data) < 2:
            continue  # an empty message only announces the channel
        channel, data = message.data[0], message.data[1:]
        if channel in (STDOUT, STDERR):
            output += data
            del output[:-EXEC_OUTPUT_MAX_BYTES]
        elif channel == ERROR:
            try:
                ending = Ending.decode(data)
            except ValueError as error:
                raise ApiError(0, "Undecodable", f"command status: {error}") from error
            if ending.exit_code is None:
                raise ApiError(ending.status, ending.reason, ending.message)
            return ExecResult(ending.exit_code, output.decode(errors="replace"))
    code = messages.close_code
    raise ApiError(0, "Unreachable", f"connection closed before the command ended ({code})")


async def raise_refused_upgrade(response: aiohttp.ClientResponse) -> None:
    """Raise the Status of a refused upgrade, which aiohttp's own error does not include."""
    if response.status >= 400 and "Upgrade" in response.request_info.headers:
        raise api_error(response, await response.read())
