"""Kubernetes' channel protocol for ``exec`` over a WebSocket, and the status of a command.

Defines the constants and the status message; does no I/O. Every binary message is one byte with the
channel's number, followed by data for that channel. The server streams STDOUT and STDERR and
finally sends one message on ERROR: a JSON Status with the command's outcome. The client may send
STDIN; in version 5 it may also close it with a message of two bytes, CLOSE and the channel's
number.

Used by kube.py (client) and the process kubelet (server).
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

V4, V5 = "v4.channel.k8s.io", "v5.channel.k8s.io"
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


__all__ = ["CLOSE", "ERROR", "STDERR", "STDIN", "STDOUT", "V4", "V5", "Ending"]
