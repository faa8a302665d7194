"""Credentials of the embedded API: the token, the certificates and the kubeconfig.

All files are in the data directory with mode 0600, and stay the same across restarts; the
kubeconfig changes only with its port or namespace. TLS is used because Go clients send a
kubeconfig's token over https only. The certificate authority signs loopback names only.
"""

from __future__ import annotations

import secrets
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from kubeai.local import certificates

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_RENEW_BEFORE_DAYS = 30


class Credentials(NamedTuple):
    """The server's credentials; `write_kubeconfig` writes those of the clients."""

    token: str
    tls: ssl.SSLContext
    directory: Path

    def write_kubeconfig(self, port: int, namespace: str) -> Path:
        """Write a kubeconfig for the server on this port, and return its path."""
        path = self.directory / "kubeconfig"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "kubeai",
            "clusters": [
                {
                    "name": "kubeai",
                    "cluster": {
                        "server": f"https://127.0.0.1:{port}",
                        "certificate-authority": str(self.directory / "ca.crt"),
                    },
                }
            ],
            "users": [{"name": "kubeai", "user": {"token": self.token}}],
            "contexts": [
                {
                    "name": "kubeai",
                    "context": {"cluster": "kubeai", "user": "kubeai", "namespace": namespace},
                }
            ],
        }
        certificates.write_private(path, yaml.safe_dump(config).encode())
        return path


def load(directory: Path) -> Credentials:
    """Read the credentials in the data directory; create those that are missing."""
    directory = directory.resolve()
    token_file = directory / "token"
    if not token_file.exists():
        certificates.write_private(token_file, secrets.token_urlsafe(32).encode())
    if _expires_soon(directory):
        _make_certificates(directory)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    return Credentials(token_file.read_text().strip(), tls, directory)


def _expires_soon(directory: Path) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate((directory / "tls.crt").read_bytes())
    except (OSError, ValueError):
        return True
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    complete = (directory / "ca.crt").exists() and (directory / "tls.key").exists()
    return not complete or left < timedelta(days=_RENEW_BEFORE_DAYS)


def _make_certificates(directory: Path) -> None:
    """Create a CA and the one certificate that it signs; the CA's key is never stored."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = certificates.name("kubeai local authority")
    authority = (
        certificates.builder(issuer, issuer, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(certificates.key_usage(authority=True), critical=True)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    names: list[x509.GeneralName] = [
        x509.DNSName(name) if name == "localhost" else x509.IPAddress(ip_address(name))
        for name in LOOPBACK
    ]
    certificate = (
        certificates.builder(certificates.name("kubeai local api"), issuer, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(certificates.key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    certificates.write_private(directory / "tls.key", certificates.pem_of(key))
    certificates.write_private(
        directory / "ca.crt", authority.public_bytes(serialization.Encoding.PEM)
    )
    certificates.write_private(
        directory / "tls.crt", certificate.public_bytes(serialization.Encoding.PEM)
    )
