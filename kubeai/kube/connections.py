"""Sockets and TLS of the connections to the Kubernetes API."""

from __future__ import annotations

import contextlib
import socket
import ssl
from urllib.parse import urlsplit

import aiohttp

from kubeai.kube.auth import Access


def tls_context(access: Access) -> ssl.SSLContext:
    """The TLS settings of a cluster's connections."""
    context = ssl.create_default_context(cafile=access.ca_file)
    if access.cert_file:
        context.load_cert_chain(access.cert_file, access.key_file)
    if not access.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def open_socket(address: aiohttp.AddrInfoType, *, unacknowledged_max_s: float) -> socket.socket:
    """A socket that drops data its peer does not acknowledge in time, even after it is closed.

    Otherwise Linux retransmits for about 15 minutes, and a write that was lost in a network
    partition takes effect when the partition heals.
    """
    family, kind, protocol, _, _ = address
    sock = socket.socket(family, kind, protocol)
    limit_ms = max(1, round(unacknowledged_max_s * 1000))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
    return sock


def enable_keep_alive(response: aiohttp.ClientResponse) -> None:
    """Enable keep-alive, so that a watch whose peer vanished silently fails after about 20 s.

    The first probe is sent after 15 s. When the second is due, the socket's limit for
    unacknowledged data (see `open_socket`) is exceeded; it replaces the probe count here.
    """
    connection = response.connection
    transport = connection.transport if connection is not None else None
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)


def is_loopback(url: str) -> bool:
    """Whether a URL names this machine."""
    host = urlsplit(url).hostname or ""
    return host == "localhost" or host.startswith("127.") or host == "::1"
