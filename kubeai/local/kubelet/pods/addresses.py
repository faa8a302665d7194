"""A loopback address for each pod, unique on this machine while the pod exists.

All of 127.0.0.0/8 is this machine, and each address has its own ports. An address is claimed by
binding an abstract Unix socket named after it: the kernel allows one owner per name, across users,
and releases it when the process exits. So two kubelets never use the same address, and nothing
needs cleaning up.
"""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Callable, Iterable

from kubeai.errors import KubeAIError

ATTEMPTS_MAX = 1000


class PodAddress:
    """A claimed address; :meth:`release` it when all processes of the pod have exited."""

    def __init__(self, ip: str, claim: socket.socket) -> None:
        self.ip = ip
        self._claim = claim

    def release(self) -> None:
        """Let other pods claim the address."""
        self._claim.close()

    @classmethod
    def claim(
        cls,
        preferred: str = "",
        ports: Iterable[int] = (),
        rand: Callable[[int, int], int] = random.randint,
    ) -> PodAddress:
        """Claim an address on which all ``ports`` are free; ``preferred`` if possible.

        KubeAIError names the ports if there is none (something listens on all addresses).
        """
        ports = tuple(ports)
        for attempt in range(ATTEMPTS_MAX):
            ip = preferred if attempt == 0 else ""
            # Not 127.0.x.y: 127.0.0.1 is shared, and Debian maps the host name to 127.0.1.1.
            ip = ip or f"127.{rand(1, 254)}.{rand(0, 255)}.{rand(1, 254)}"
            if not _usable(ip):
                continue
            claim = _claim(ip)
            if claim is None:
                continue
            if all(_bindable(ip, port) for port in (0, *ports)):
                return cls(ip, claim)
            claim.close()
            if attempt >= 20:
                break  # not a taken address, but a port that is taken on all of them
        raise KubeAIError(
            f"no loopback address with free ports {', '.join(map(str, ports))}: "
            "is another process listening on 0.0.0.0?"
        )


def _usable(ip: str) -> bool:
    try:
        address = ipaddress.IPv4Address(ip)
    except ValueError:
        return False
    return address.is_loopback and address.packed[1] != 0 and 0 < address.packed[3] < 255


def _claim(ip: str) -> socket.socket | None:
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0kubeai-pod-{ip}")
    except OSError:
        claim.close()
        return None
    return claim


def _bindable(ip: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore TIME_WAIT
        try:
            tried.bind((ip, port))
            tried.listen(1)
        except OSError:
            return False
        return True
