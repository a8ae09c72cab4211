"""Certificates of every kind for tests, good and bad ones; independent of the code that makes them for people."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from protos.tls import COORDINATOR_NAME

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

COORDINATOR_NAMES = (COORDINATOR_NAME, "localhost", "127.0.0.1")


class TestAuthority:
    """A certificate authority."""

    __test__ = False

    def __init__(self, name: str = "test authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (
            self._sign(self._name, self._key, days=(-1, 30))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self,
        folder: Path,
        *names: str,
        days: tuple[float, float] = (-1, 30),
        self_signed: bool = False,
        key: PrivateKey | None = None,
        trusts: TestAuthority | None = None,
    ) -> Path:
        """Write a folder.

        Args:
            folder: for the three files; what is there is overwritten.
            names: DNS names and IP addresses.
            days: from and until when it is valid, counted from now.
            self_signed: signed by its own key.
            key: of the certificate; by default a new one of P-256.
            trusts: whose certificate is in ca.crt; by default this authority's.

        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
        builder = self._sign(subject, key, days=days, issuer=subject if self_signed else self._name)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        certificate = builder.sign(key if self_signed else self._key, hashes.SHA256())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tls.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        (folder / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (folder / "ca.crt").write_bytes((trusts or self).pem)
        return folder

    def _sign(
        self,
        subject: x509.Name,
        key: PrivateKey,
        *,
        days: tuple[float, float],
        issuer: x509.Name | None = None,
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer or self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
        )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
