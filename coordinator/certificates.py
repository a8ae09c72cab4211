"""A set of certificates for one machine: an authority, and one certificate for each role. Clusters have cert-manager."""

from __future__ import annotations

import ipaddress
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protos.certificates import AUTHORITIES_FILE, CERTIFICATE_FILE, KEY_FILE
from protos.errors import InvalidArgument
from protos.tls import COORDINATOR_NAME, WORKER_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CALLER_NAME = "caller.shardmesh"
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

_DNS_NAME = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_CLOCK_SKEW = timedelta(minutes=5)


def make_set(directory: Path, hosts: Sequence[str], days: int) -> list[Path]:
    """Write the folders `ca`, `coordinator`, `worker` and `caller`; return them.

    Args:
        directory: where; made if missing.
        hosts: names or IP addresses by which callers reach the coordinator, besides this machine's own.
        days: how long all of them are valid.

    Raises:
        InvalidArgument: a folder is there already or cannot be written, or a host is no name.

    """
    names: dict[str, list[x509.GeneralName]] = {
        "coordinator": [_general_name(name) for name in dict.fromkeys((COORDINATOR_NAME, *LOCAL_HOSTS, *hosts))],
        "worker": [x509.DNSName(WORKER_NAME)],
        "caller": [x509.DNSName(CALLER_NAME)],
    }
    folders = {role: directory / role for role in ("ca", *names)}
    if present := [str(folder) for folder in folders.values() if folder.exists()]:
        raise InvalidArgument(f"{', '.join(present)} is there already: nothing was written; remove it or name another folder")
    authority = Authority(days)
    try:
        authority.write(folders["ca"], authority.certificate, authority.key)
        for role, own in names.items():
            key = ec.generate_private_key(ec.SECP256R1())
            authority.write(folders[role], authority.sign(role, key.public_key(), own), key)
    except OSError as error:
        raise InvalidArgument(f"{directory}: cannot be written: {error.strerror}") from None
    return list(folders.values())


class Authority:
    """A certificate authority that lives as long as this object, unless its key is written."""

    def __init__(self, days: int) -> None:
        """Make key and certificate.

        Args:
            days: how long its certificate, and those that it signs, are valid.

        """
        self._validity = timedelta(days=days)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("authority")
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        self.certificate = (
            self._builder(self._name, self.key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self.key, hashes.SHA256())
        )

    def sign(self, role: str, key: ec.EllipticCurvePublicKey, names: list[x509.GeneralName]) -> x509.Certificate:
        """Make a certificate for a role: coordinators are server and client, workers a server, callers a client."""
        usages = []
        if role != "caller":
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        if role != "worker":
            usages.append(ExtendedKeyUsageOID.CLIENT_AUTH)
        return (
            self._builder(_name(role), key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def write(self, folder: Path, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        """Write the three files of a folder; the key is for its owner's eyes."""
        folder.mkdir(parents=True)
        (folder / KEY_FILE).touch(mode=0o600)
        (folder / KEY_FILE).write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        (folder / CERTIFICATE_FILE).write_bytes(certificate.public_bytes(Encoding.PEM))
        (folder / AUTHORITIES_FILE).write_bytes(self.certificate.public_bytes(Encoding.PEM))

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            # A peer's clock may be a little late.
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + self._validity)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        )


def _name(role: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"shardmesh {role}")])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _DNS_NAME.fullmatch(host):
        raise InvalidArgument(f"--host {host!r} is neither a DNS name in ASCII nor an IP address")
    return x509.DNSName(host)
