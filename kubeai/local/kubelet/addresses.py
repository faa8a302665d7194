"""A loopback address for each pod, unique on this machine while the pod lives.

All of 127.0.0.0/8 is this machine; a port on one of its addresses is free of the same port on the
others. An address is claimed by an abstract Unix socket named after it: the kernel lets one
process of the machine have that name, whoever its user is, and gives it up with the process. So
two kubelets never hand out the same address, and nothing is left to clean up.
"""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Callable, Iterable

from kubeai.errors import KubeAIError

ATTEMPTS_MAX = 1000


class PodAddress:
    """A claimed address; :meth:`release` it when no process of the pod is left."""

    def __init__(self, ip: str, claim: socket.socket) -> None:
        self.ip = ip
        self._claim = claim

    def release(self) -> None:
        self._claim.close()

    @classmethod
    def claim(
        cls,
        preferred: str = "",
        ports: Iterable[int] = (),
        rand: Callable[[int, int], int] = random.randint,
    ) -> PodAddress:
        """An address on which every one of ``ports`` can be bound; ``preferred`` if it is free.

        KubeAIError names the ports when there is none (something listens on all addresses).
        """
        ports = tuple(ports)
        for attempt in range(ATTEMPTS_MAX):
            ip = preferred if attempt == 0 else ""
            # Not 127.0.x.y: 127.0.0.1 is everybody's, Debian gives 127.0.1.1 to the host's name.
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
                break  # not one taken address but a port that is taken on all of them
        raise KubeAIError(
            f"no loopback address has its ports {', '.join(map(str, ports))} free: "
            "is something listening on 0.0.0.0?"
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
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT is no user
        try:
            tried.bind((ip, port))
            tried.listen(1)
        except OSError:
            return False
        return True
