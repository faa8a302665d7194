"""Listening sockets."""

from __future__ import annotations

import errno
import socket
from ipaddress import ip_address

from kubeai.errors import KubeAIError
from kubeai.port_owners import port_owner

LISTEN_BACKLOG = 4_096


def parse_address(address: str) -> tuple[str, int]:
    """``host:port`` or ``:port`` (all interfaces), as the system config writes it."""
    host, _, port = address.rpartition(":")
    return host.strip("[]") or "0.0.0.0", int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on a host, an address or a name."""
    try:
        return ip_address(host if ":" in host else socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False


def authority(host: str, port: int) -> str:
    """``host:port`` as URLs and the system config write it, IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int, count: int, setting: str) -> list[socket.socket]:
    """``count`` listening sockets on one port; the kernel spreads connections over them.

    KubeAIError if that fails. It names ``setting``: the option, or the key of the system config.
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
        raise KubeAIError(
            f"{setting}: cannot listen on {authority(host, port)}: "
            f"{_why(error, host, port, setting)}"
        ) from None
    return sockets


def _why(error: OSError, host: str, port: int, setting: str) -> str:
    """The reason, and what to change."""
    is_option = setting.startswith("--")
    if error.errno == errno.EADDRINUSE:
        owner = port_owner(port)
        by = f" by {owner}" if owner else ""
        choose = "choose another port (0: any free one)" if is_option else "set another address"
        return f"address already in use{by}; {choose}"
    where = "--host" if is_option else setting
    if isinstance(error, socket.gaierror):
        return f"{host} is not an address ({error.strerror}); change {where}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"no interface of this machine has the address {host}; change {where}"
    if error.errno == errno.EACCES:
        return "permission denied; ports below 1024 need root, choose another one"
    return error.strerror or str(error)
