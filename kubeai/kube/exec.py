"""The client's side of ``exec``: reads a command's output and its status."""

from __future__ import annotations

from typing import NamedTuple

import aiohttp

from kubeai.kube import exec_channels
from kubeai.kube.errors import ApiError, api_error

EXEC_OUTPUT_MAX_BYTES = 64 << 10  # the tail of a command's output that is kept


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
        if channel in (exec_channels.STDOUT, exec_channels.STDERR):
            output += data
            del output[:-EXEC_OUTPUT_MAX_BYTES]
        elif channel == exec_channels.ERROR:
            try:
                ending = exec_channels.Ending.decode(data)
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
