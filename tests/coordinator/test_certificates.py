"""A set of certificates for one machine: what is in it, for whom, and that it overwrites nothing."""

import datetime as dt
import ipaddress
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from coordinator.certificates import make_set
from protos.certificates import FILES, Certificates
from protos.errors import InvalidArgument
from protos.tls import COORDINATOR_NAME, WORKER_NAME

ROLES = ["ca", "coordinator", "worker", "caller"]


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())


def names(folder: Path) -> list[str]:
    found = certificate(folder).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in found]


def test_each_role_has_a_folder_that_its_program_takes(tmp_path: Path) -> None:
    made = make_set(tmp_path / "certs", [], 30)
    assert made == [tmp_path / "certs" / role for role in ROLES]
    for folder in made:
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
        assert stat.S_IMODE((folder / "tls.key").stat().st_mode) == 0o600
        Certificates(folder)
        assert (folder / "ca.crt").read_bytes() == (made[0] / "tls.crt").read_bytes()
    Certificates(tmp_path / "certs" / "coordinator", name=COORDINATOR_NAME)
    Certificates(tmp_path / "certs" / "worker", name=WORKER_NAME)


def test_the_coordinators_hosts_are_names_or_addresses_and_each_is_there_once(tmp_path: Path) -> None:
    make_set(tmp_path, ["gpu.example", "10.1.2.3", "localhost", "gpu.example"], 30)
    hosts = ["localhost", "127.0.0.1", "::1", "gpu.example", "10.1.2.3"]
    assert names(tmp_path / "coordinator") == [COORDINATOR_NAME, *hosts]
    assert names(tmp_path / "worker") == [WORKER_NAME]
    san = certificate(tmp_path / "coordinator").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.IPAddress)[-1] == ipaddress.ip_address("10.1.2.3")


def test_a_worker_can_be_no_client_and_a_caller_no_server(tmp_path: Path) -> None:
    make_set(tmp_path, [], 30)
    server, client = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    for role, usages in (("coordinator", [server, client]), ("worker", [server]), ("caller", [client])):
        found = certificate(tmp_path / role).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(found) == usages
        assert not certificate(tmp_path / role).extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_the_authority_signed_all_and_each_is_valid_from_now_for_as_long_as_asked(tmp_path: Path) -> None:
    make_set(tmp_path, [], 30)
    authority = certificate(tmp_path / "ca")
    now = dt.datetime.now(dt.UTC)
    for role in ROLES:
        one = certificate(tmp_path / role)
        one.verify_directly_issued_by(authority)
        assert one.not_valid_before_utc < now
        assert abs(one.not_valid_after_utc - now - dt.timedelta(days=30)) < dt.timedelta(minutes=1)


def test_two_sets_have_nothing_in_common(tmp_path: Path) -> None:
    keys = set()
    for name in ("one", "two"):
        make_set(tmp_path / name, [], 30)
        keys |= {(tmp_path / name / role / "tls.key").read_bytes() for role in ROLES}
    assert len(keys) == 2 * len(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_nothing_is_overwritten(tmp_path: Path, role: str) -> None:
    (tmp_path / role).mkdir()
    with pytest.raises(InvalidArgument, match=f"{tmp_path / role} is there already: nothing was written"):
        make_set(tmp_path, [], 30)
    assert list(tmp_path.rglob("*")) == [tmp_path / role]


@pytest.mark.parametrize("host", ["", "münchen.example", "a b", "http://x", "x:1"])
def test_what_is_no_host_is_refused_before_anything_is_written(tmp_path: Path, host: str) -> None:
    with pytest.raises(InvalidArgument, match="is neither a DNS name in ASCII nor an IP address"):
        make_set(tmp_path, [host], 30)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match=f"{tmp_path}/file: cannot be written: Not a directory"):
        make_set(tmp_path / "file", [], 30)
