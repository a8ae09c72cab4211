"""Certificates in a folder, read again when they change. The files are those of a Kubernetes TLS Secret."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from protos.errors import InvalidArgument
from protos.watched import WatchedFiles

CERTIFICATE_FILE = "tls.crt"
KEY_FILE = "tls.key"
AUTHORITIES_FILE = "ca.crt"
FILES = (CERTIFICATE_FILE, KEY_FILE, AUTHORITIES_FILE)


_CURVES = (ec.SECP256R1, ec.SECP384R1)
_LEAST_RSA_BITS = 2048
_DAMAGED = (
    *(ValueError, TypeError, UnsupportedAlgorithm),
    *(x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)
"""What the library raises for files that are no good."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What the files of a folder say, as PEM; None for a file that need not be there and is not."""

    chain: bytes | None
    key: bytes | None = field(repr=False)
    authorities: bytes | None


class Certificates:
    """A folder's certificates, as new as the files."""

    def __init__(self, directory: Path, *, needs: tuple[str, ...] = FILES, name: str | None = None) -> None:
        """Read them for the first time.

        Args:
            directory: with `FILES`.
            needs: those that must be there.
            name: DNS name that the certificate must carry, if any.

        Raises:
            InvalidArgument: a file is missing, damaged, expired, or of somebody else.

        """
        self._directory = directory
        self._needs = needs
        self._name = name
        self._files = WatchedFiles([directory / file for file in FILES], self._load)

    def current(self) -> Identity:
        """Give what the files say now, the same object as long as they do not change. Safe in any thread.

        New files that cannot be used leave the old ones in force, and a line in the log.
        """
        return self._files.current()

    def _load(self) -> Identity:
        chain, key, authorities = (self._read(name) for name in FILES)
        if chain is not None and key is not None:
            self._check_own(chain, key)
        elif chain or key:
            raise self._error(f"{CERTIFICATE_FILE} and {KEY_FILE} belong together, one is missing")
        if authorities is not None:
            self._parse(AUTHORITIES_FILE, authorities)
        return Identity(chain, key, authorities)

    def _read(self, name: str) -> bytes | None:
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            if name not in self._needs:
                return None
            raise self._error(f"{name} is missing; wanted {', '.join(self._needs)}") from None
        except OSError as error:
            raise self._error(f"{name} cannot be read: {error.strerror}") from None

    def _check_own(self, chain: bytes, key: bytes) -> None:
        certificate = self._parse(CERTIFICATE_FILE, chain)[0]
        try:
            public = load_pem_private_key(key, None).public_key()
        except _DAMAGED:
            raise self._error(f"{KEY_FILE} is not a private key in PEM without a password") from None
        if not _speaks_tls(public):
            # gRPC would take it, and end every connection without a word.
            raise self._error(f"{KEY_FILE} must be of RSA with {_LEAST_RSA_BITS} bits or more, or of the curve P-256 or P-384")
        if certificate.public_key() != public:
            raise self._error(f"{KEY_FILE} is not the key of {CERTIFICATE_FILE}")
        now = datetime.now(UTC)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            first, last = (
                f"{time:%Y-%m-%d %H:%M}" for time in (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
            )
            raise self._error(f"{CERTIFICATE_FILE} is valid from {first} to {last} UTC only: renew it")
        if self._name and self._name not in (names := dns_names(certificate)):
            raise self._error(f"{CERTIFICATE_FILE} must be for the DNS name {self._name}, found {', '.join(names) or 'none'}")

    def _parse(self, name: str, data: bytes) -> list[x509.Certificate]:
        try:
            certificates = x509.load_pem_x509_certificates(data)
            for certificate in certificates:
                certificate.public_key()
                dns_names(certificate)
        except _DAMAGED:
            raise self._error(f"{name} has no certificate in PEM, or a damaged one") from None
        return certificates

    def _error(self, text: str) -> InvalidArgument:
        return InvalidArgument(f"TLS folder {self._directory}: {text}")


def dns_names(certificate: x509.Certificate) -> list[str]:
    """Read the DNS names that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.DNSName)


def _speaks_tls(key: object) -> bool:
    if isinstance(key, rsa.RSAPublicKey):
        return key.key_size >= _LEAST_RSA_BITS
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES)
