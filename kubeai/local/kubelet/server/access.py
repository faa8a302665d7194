"""Authentication of the kubelet's clients, for both kinds of API server.

The embedded API presents the token of its own clients, over HTTP, as both are on loopback. A real
API server talks to kubelets over TLS only, does not verify their certificate by default, and
presents a client certificate (``--kubelet-client-certificate``).
"""

from __future__ import annotations

import hmac
import ssl
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol

from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from kubeai.errors import KubeAIError
from kubeai.local import certificates


class Access(Protocol):
    """Implemented by TokenAccess and CertificateAccess."""

    @property
    def tls(self) -> ssl.SSLContext | None:
        """The TLS context to listen with; None for plain HTTP."""

    def admits(self, request: web.Request) -> bool:
        """Whether the client of this request may read logs and run commands."""


class TokenAccess:
    """Admits clients with a bearer token."""

    tls = None

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def admits(self, request: web.Request) -> bool:
        """Whether the request has the token, compared in constant time."""
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        return hmac.compare_digest(sent, self._token)


class CertificateAccess:
    """Admits clients with a certificate from a CA and, if given, the name ``client_name``."""

    tls: ssl.SSLContext

    def __init__(self, client_ca: Path, client_name: str, ip: str, directory: Path) -> None:
        """Creates a new serving certificate for ``ip`` in ``directory``."""
        self._name = client_name
        _make_certificate(directory, ip)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(directory / "kubelet.crt", directory / "kubelet.key")
        try:
            self.tls.load_verify_locations(client_ca)
        except OSError as error:  # including ssl.SSLError for an invalid certificate
            raise KubeAIError(f"--client-ca-file: {client_ca}: {error.strerror or error}") from None
        # Not CERT_REQUIRED: a client without a certificate gets 401, not a failed handshake.
        self.tls.verify_mode = ssl.CERT_OPTIONAL

    def admits(self, request: web.Request) -> bool:
        """Whether the client has shown a certificate with the required name."""
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
