"""Who may ask the kubelet: each kind of API shows itself in its own way.

The embedded API shows the token that its own clients know, over HTTP, as both are on loopback. A
real API server speaks to kubelets over TLS alone, does not check their certificate unless it is
told to, and shows a certificate of its own (``--kubelet-client-certificate``).
"""

from __future__ import annotations

import hmac
import ssl
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from kubeai.errors import KubeAIError
from kubeai.http import web
from kubeai.local import certificates


class Access(Protocol):
    """One of the two below."""

    @property
    def tls(self) -> ssl.SSLContext | None:
        """What to listen with; None: plain HTTP."""

    def admits(self, request: web.Request) -> bool: ...


class TokenAccess:
    """For who knows a bearer token."""

    tls = None

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def admits(self, request: web.Request) -> bool:
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        return hmac.compare_digest(sent, self._token)


class CertificateAccess:
    """For who has a certificate of an authority, and of one name of it if a name is given."""

    tls: ssl.SSLContext

    def __init__(self, client_ca: Path, client_name: str, ip: str, directory: Path) -> None:
        """The kubelet's own certificate, for ``ip``, is made anew in ``directory``."""
        self._name = client_name
        _make_certificate(directory, ip)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(directory / "kubelet.crt", directory / "kubelet.key")
        try:
            self.tls.load_verify_locations(client_ca)
        except OSError as error:  # ssl.SSLError, for what is no certificate, is one
            raise KubeAIError(f"--client-ca-file: {client_ca}: {error.strerror or error}") from None
        # Not CERT_REQUIRED: a client without one is told 401, not that the handshake failed.
        self.tls.verify_mode = ssl.CERT_OPTIONAL

    def admits(self, request: web.Request) -> bool:
        shown = request.get_extra_info("peercert")
        if not shown:
            return False
        names = [value for part in shown["subject"] for key, value in part if key == "commonName"]
        return not self._name or self._name in names


def _make_certificate(directory: Path, ip: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = certificates.name("kubeai process kubelet")
    addresses = x509.SubjectAlternativeName([x509.IPAddress(ip_address(ip))])
    certificate = (
        certificates.builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(certificates.key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(addresses, critical=False)
        .sign(key, hashes.SHA256())
    )
    certificates.write_private(directory / "kubelet.key", certificates.pem_of(key))
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    certificates.write_private(directory / "kubelet.crt", pem)
