"""A certificate authority for tests, and client certificates of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from kubeai.local import certificates


class Client(NamedTuple):
    """Files of one client."""

    certificate: Path
    key: Path


class Authority:
    """``file`` is its own certificate; :meth:`client` signs one."""

    def __init__(self, directory: Path, name: str) -> None:
        self.file = directory / f"{name}.crt"
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = certificates.name(name)
        self.file.write_bytes(_pem(self._signed(self._name, self._key, authority=True)))

    def client(self, name: str) -> Client:
        key = ec.generate_private_key(ec.SECP256R1())
        client = Client(self._directory / f"{name}.crt", self._directory / f"{name}.key")
        client.certificate.write_bytes(_pem(self._signed(certificates.name(name), key)))
        client.key.write_bytes(certificates.pem_of(key))
        return client

    def _signed(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool = False
    ) -> x509.Certificate:
        builder = (
            certificates.builder(name, self._name, key.public_key())
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(certificates.key_usage(authority=authority), critical=True)
        )
        if not authority:
            usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
            builder = builder.add_extension(usage, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
