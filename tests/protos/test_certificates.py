"""What a folder must hold, what is refused with which words, and that old certificates outlive broken new ones."""

import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from protos import watched
from protos.certificates import AUTHORITIES_FILE, CERTIFICATE_FILE, KEY_FILE, Certificates
from protos.errors import InvalidArgument
from protos.tls import COORDINATOR_NAME, WORKER_NAME
from tests.authority import PrivateKey, TestAuthority


@pytest.fixture(scope="module")
def authority() -> TestAuthority:
    return TestAuthority()


@pytest.fixture
def folder(tmp_path: Path, authority: TestAuthority) -> Path:
    return authority.issue(tmp_path / "worker", WORKER_NAME, "10.0.0.1")


def test_a_good_folder_is_taken_as_it_is(folder: Path) -> None:
    identity = Certificates(folder, name=WORKER_NAME).current()
    assert identity.chain == (folder / CERTIFICATE_FILE).read_bytes()
    assert identity.key == (folder / KEY_FILE).read_bytes()
    assert identity.authorities == (folder / AUTHORITIES_FILE).read_bytes()
    assert "PRIVATE KEY" in str(identity.key)
    assert "PRIVATE KEY" not in repr(identity)


@pytest.mark.parametrize("name", [CERTIFICATE_FILE, KEY_FILE, AUTHORITIES_FILE])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InvalidArgument, match=f"TLS folder {folder}: {name} is missing; wanted tls.crt, tls.key, ca.crt"):
        Certificates(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [(CERTIFICATE_FILE, "no certificate in PEM"), (KEY_FILE, "not a private key"), (AUTHORITIES_FILE, "no certificate in PEM")],
)
@pytest.mark.parametrize("data", [b"", b"nonsense", b"\xff\x00", "half"])
def test_a_damaged_file_is_named(folder: Path, name: str, text: str, data: bytes | str) -> None:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else path.read_bytes()[:100])
    with pytest.raises(InvalidArgument, match=rf"{name} .*{text}|{name} has {text}"):
        Certificates(folder)


def test_a_folder_in_the_place_of_a_file_is_named(folder: Path) -> None:
    (folder / KEY_FILE).unlink()
    (folder / KEY_FILE).mkdir()
    with pytest.raises(InvalidArgument, match=r"tls.key cannot be read: Is a directory"):
        Certificates(folder)


def test_the_key_of_another_certificate_is_refused(folder: Path, tmp_path: Path, authority: TestAuthority) -> None:
    shutil.copy(authority.issue(tmp_path / "other", WORKER_NAME) / KEY_FILE, folder / KEY_FILE)
    with pytest.raises(InvalidArgument, match=r"tls.key is not the key of tls.crt"):
        Certificates(folder)


@pytest.mark.parametrize(
    "key",
    [
        ed25519.Ed25519PrivateKey.generate(),
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP256K1()),
        rsa.generate_private_key(65537, 1024),  # noqa: S505  # that is the point
    ],
    ids=["Ed25519", "P-521", "secp256k1", "RSA of 1024 bits"],
)
def test_a_key_with_which_no_connection_could_be_made_is_refused(folder: Path, authority: TestAuthority, key: PrivateKey) -> None:
    authority.issue(folder, WORKER_NAME, key=key)
    with pytest.raises(InvalidArgument, match=r"tls.key must be of RSA with 2048 bits or more, or of the curve P-256 or P-384"):
        Certificates(folder)


@pytest.mark.parametrize("days", [(-3, -1), (1, 3)])
def test_a_certificate_that_is_not_of_today_is_refused(folder: Path, authority: TestAuthority, days: tuple[int, int]) -> None:
    authority.issue(folder, WORKER_NAME, days=days)
    with pytest.raises(InvalidArgument, match=r"tls.crt is valid from .* to .* UTC only: renew it"):
        Certificates(folder)


@pytest.mark.parametrize(("names", "found"), [((COORDINATOR_NAME, "10.0.0.1"), COORDINATOR_NAME), ((), "none")])
def test_a_certificate_for_another_role_is_refused(
    folder: Path, authority: TestAuthority, names: tuple[str, ...], found: str
) -> None:
    authority.issue(folder, *names)
    with pytest.raises(InvalidArgument, match=f"must be for the DNS name {WORKER_NAME}, found {found}"):
        Certificates(folder, name=WORKER_NAME)
    Certificates(folder)


def test_what_is_not_needed_may_be_missing_but_not_half(folder: Path) -> None:
    (folder / CERTIFICATE_FILE).unlink()
    with pytest.raises(InvalidArgument, match=r"tls.crt and tls.key belong together, one is missing"):
        Certificates(folder, needs=(AUTHORITIES_FILE,))
    (folder / KEY_FILE).unlink()
    identity = Certificates(folder, needs=(AUTHORITIES_FILE,)).current()
    assert (identity.chain, identity.key) == (None, None)


def test_a_half_written_change_keeps_the_old_certificates_until_it_is_whole(
    folder: Path, tmp_path: Path, authority: TestAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Mock()
    monkeypatch.setattr(watched, "log", log)
    certificates = Certificates(folder, name=WORKER_NAME)
    before = certificates.current()
    new = authority.issue(tmp_path / "new", WORKER_NAME)
    shutil.copy(new / CERTIFICATE_FILE, folder / CERTIFICATE_FILE)
    assert certificates.current() is before
    assert certificates.current() is before
    shutil.copy(new / KEY_FILE, folder / KEY_FILE)
    assert certificates.current().chain == (new / CERTIFICATE_FILE).read_bytes()
    log.warning.assert_called_once()
    assert "tls.key is not the key of tls.crt" in log.warning.call_args.kwargs["error"]
