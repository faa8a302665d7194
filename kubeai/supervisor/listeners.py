"""Listening sockets."""

from __future__ import annotations

import socket

from kubeai.errors import KubeAIError

LISTEN_BACKLOG = 4_096


def parse_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``:port`` (all interfaces), as the system config writes it."""
    host, _, port = address.rpartition(":")
    return host.strip("[]") or "0.0.0.0", int(port)


def listen(host: str, port: int, count: int) -> list[socket.socket]:
    """``count`` listening sockets on one port; the kernel spreads connections over them.

    A probe socket is bound without SO_REUSEPORT first, so that a port in use by another program is
    an error even if that program set SO_REUSEPORT.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sockets: list[socket.socket] = []
    try:
        probe = socket.socket(family, socket.SOCK_STREAM)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with probe:
            probe.bind((host, port))
            port = probe.getsockname()[1]
        for _ in range(count):
            sock = socket.socket(family, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((host, port))
            sock.listen(LISTEN_BACKLOG)
            sock.setblocking(False)
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise KubeAIError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return sockets
