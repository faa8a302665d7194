"""Who may see the console, which the supervisor serves and a worker relays to like to any upstream.

Until there are keys, only clients on this machine may: the TCP peer is a loopback address, and no
proxy has passed the request on. A page of another site must not use the browser of such a client
either: the Host must not be a name that an attacker can point here (DNS rebinding), and an Origin
must be the console's own. The supervisor checks the rest, such as the headers of changes. Called by
proxy.py.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kubeai.errors import quoted
from kubeai.openai.errors import BadRequest

if TYPE_CHECKING:
    from kubeai.gateway.relay._exchange import Exchange

PATH = "/ui"
CONSOLE_BODY_MAX_BYTES = 4 << 20  # of manifests


def is_console(path: str) -> bool:
    """Whether a request target in origin form belongs to the console."""
    path = path.partition("?")[0]
    return path == PATH or path.startswith(PATH + "/")


def check_request(request: Exchange, hosts: Collection[str]) -> None:
    """:func:`check_client` for a request whose head is complete."""
    check_client(
        request.peer,
        request.host,
        [origin.decode("latin-1") for origin in request.headers(b"origin")],
        forwarded=request.is_forwarded or any(map(request.headers, (b"forwarded", b"via"))),
        hosts=hosts,
    )


def check_client(
    peer: str,
    host: str | None,
    origins: Collection[str],
    *,
    forwarded: bool,
    hosts: Collection[str] = (),
) -> None:
    """BadRequest if the client may not see the console.

    ``peer``: its address. ``host``, ``origins``: its Host and Origin headers. ``forwarded``:
    whether a proxy has passed the request on. ``hosts``: allowed names in Host, besides IP
    addresses and localhost.
    """
    if forwarded or not _is_loopback(peer):
        raise BadRequest(
            "The console is only served to loopback addresses. Use `kubectl port-forward`.",
            status=403,
            code="not_loopback",
        )
    name = _host_name(host or "")
    if not (_is_address(name) or _is_localhost(name) or name in map(str.lower, hosts)):
        raise BadRequest(
            f"The console is not served as {quoted(name)}. Use localhost, or add the name to "
            "gateway.ui.hosts.",
            status=421,
            code="unknown_host",
        )
    for origin in origins:
        if _authority(origin) != (host or "").lower():
            raise BadRequest(
                "Requests from other sites are not allowed.", status=403, code="foreign_origin"
            )


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(host: str) -> str:
    """A Host header without its port and brackets, in lower case."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_localhost(name: str) -> bool:
    return name == "localhost" or name.endswith(".localhost")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(peer: str) -> bool:
    try:
        address = ip_address(peer)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
