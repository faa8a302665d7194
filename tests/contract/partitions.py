"""A machine whose network can be cut: a network namespace, and another where the API is reached.

Needs root, and a kernel with namespaces and veth; without them :func:`apart` skips the test.
"""

from __future__ import annotations

import contextlib
import ctypes
import secrets
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

CLONE_NEWNET = 0x40000000
HERE, THERE = "192.0.2.1", "192.0.2.2"  # kept for examples: of no use outside
NOBODY = "02:00:00:00:00:01"


class Apart:
    """The machine, while its namespaces are there."""

    def __init__(self, here: str, there: str) -> None:
        self._here, self._there = here, there
        for name in (here, there):
            self._ip("netns", "add", name)
        ends = ("link", "add", here, "netns", here, "type", "veth", "peer", "name", there)
        self._ip(*ends, "netns", there)
        for name, address in ((here, HERE), (there, THERE)):
            self._ip("-n", name, "address", "add", f"{address}/30", "dev", name)
            for device in (name, "lo"):
                self._ip("-n", name, "link", "set", device, "up")
        shown = self._ip("-n", there, "-brief", "link", "show", "dev", there)
        self._hardware = shown.split()[2]

    @property
    def within(self) -> tuple[str, ...]:
        """The command that runs another on the machine."""
        return ("ip", "netns", "exec", self._here)

    def listener(self) -> socket.socket:
        """A socket that the machine reaches, and only it."""

        def listen() -> socket.socket:
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{self._there}") as file:
                if libc.setns(file.fileno(), CLONE_NEWNET) != 0:  # this thread alone
                    raise OSError(ctypes.get_errno(), "setns")
            return socket.create_server((THERE, 0))

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(listen).result()

    def cut(self) -> None:
        """From now on nothing that the machine sends arrives; what is sent to it still does."""
        self._send_to(NOBODY)

    def heal(self) -> None:
        self._send_to(self._hardware)

    def _send_to(self, hardware: str) -> None:
        neighbour = ("neighbour", "replace", THERE, "lladdr", hardware, "nud", "permanent")
        self._ip("-n", self._here, *neighbour, "dev", self._here)

    def unacknowledged_bytes(self) -> list[int]:
        """Of each connection of the machine, closed ones included, that has some to send again."""
        command = (*self.within, "cat", "/proc/net/tcp")
        table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows = [line.split() for line in table.splitlines()[1:]]
        listening = "0A"  # there the column counts something else
        queues = [int(row[4].partition(":")[0], 16) for row in rows if row[3] != listening]
        return [queued for queued in queues if queued]

    @staticmethod
    def _ip(*arguments: str) -> str:
        command = ("ip", *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def apart():
    """The machine; OSError or CalledProcessError where this one cannot have it."""
    names = [f"k{end}{secrets.token_hex(4)}" for end in "ab"]  # of devices, too: 15 characters
    try:
        yield Apart(*names)
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                subprocess.run(("ip", "netns", "delete", name), check=False, capture_output=True)
