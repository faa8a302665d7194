"""Who may talk to the embedded API: the token, the certificates and the kubeconfig.

All files are in the data directory, mode 0600, and stay the same from start to start (the
kubeconfig is written again, because the port may have changed). TLS is there because Go clients
send a kubeconfig's token over https only; the certificate authority signs loopback names alone.
"""

from __future__ import annotations

import os
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
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_VALID_DAYS = 3650
_RENEW_BEFORE_DAYS = 30


class Credentials(NamedTuple):
    """What a server needs; `write_kubeconfig` gives clients theirs."""

    token: str
    tls: ssl.SSLContext
    directory: Path

    def write_kubeconfig(self, port: int) -> Path:
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
                    "context": {"cluster": "kubeai", "user": "kubeai", "namespace": "default"},
                }
            ],
        }
        _write(path, yaml.safe_dump(config).encode())
        return path


def load(directory: Path) -> Credentials:
    """Make what is missing in the data directory, read what is there."""
    directory = directory.resolve()
    token_file = directory / "token"
    if not token_file.exists():
        _write(token_file, secrets.token_urlsafe(32).encode())
    if _expires_soon(directory):
        _make_certificates(directory)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    return Credentials(token_file.read_text().strip(), tls, directory)


def _write(path: Path, content: bytes) -> None:
    """At once or not at all, readable by the owner alone."""
    partial = path.with_name(path.name + ".new")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    partial.replace(path)


def _expires_soon(directory: Path) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate((directory / "tls.crt").read_bytes())
    except (OSError, ValueError):
        return True
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    complete = (directory / "ca.crt").exists() and (directory / "tls.key").exists()
    return not complete or left < timedelta(days=_RENEW_BEFORE_DAYS)


def _make_certificates(directory: Path) -> None:
    """An authority whose key is thrown away at once, and the one certificate that it signs."""
    authority_key = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = _name("kubeai local authority")
    authority = (
        _builder(issuer, issuer, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
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
        _builder(_name("kubeai local api"), issuer, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    _write(directory / "tls.key", private)
    _write(directory / "ca.crt", authority.public_bytes(serialization.Encoding.PEM))
    _write(directory / "tls.crt", certificate.public_bytes(serialization.Encoding.PEM))


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=_VALID_DAYS))
    )


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
