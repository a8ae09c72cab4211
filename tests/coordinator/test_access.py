"""What the settings open: which files are read, and whom each door lets in."""

from pathlib import Path
from typing import Any

import pytest

from coordinator.access import admit_callers, open_access
from coordinator.api_keys import FOR_OPERATORS, ApiKeys, add_key
from coordinator.config import ModelSettings, SecuritySettings, ServeSettings
from protos.errors import Forbidden, InvalidArgument
from protos.interceptors import admit_all
from tests.authority import COORDINATOR_NAMES, TestAuthority


def settings(**changes: Any) -> ServeSettings:
    return ServeSettings(
        **{"model": ModelSettings("m"), "listen": "127.0.0.1:0", "workers": ("a:1",), "insecure": True, **changes}
    )


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return TestAuthority().issue(tmp_path / "own", *COORDINATOR_NAMES)


@pytest.fixture
def public(tmp_path: Path) -> Path:
    folder = TestAuthority().issue(tmp_path / "public", "mesh.example")
    (folder / "ca.crt").unlink()
    return folder


def test_without_files_everything_is_open() -> None:
    access = open_access(settings())
    assert (access.certificates, access.listener, access.guard) == (None, None, admit_all)


def test_callers_see_the_coordinators_certificate_or_their_own(own: Path, public: Path) -> None:
    access = open_access(settings(security=SecuritySettings(tls=own)))
    assert access.certificates
    assert access.listener
    access = open_access(settings(security=SecuritySettings(caller_tls=public)))
    assert access.certificates is None
    assert access.listener


def test_callers_certificates_need_an_authority(public: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"ca.crt is missing"):
        open_access(settings(security=SecuritySettings(caller_tls=public, require_caller_certificate=True)))


def test_the_public_certificate_is_none_for_workers(public: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"ca.crt is missing"):
        open_access(settings(security=SecuritySettings(tls=public)))


def test_a_socket_file_is_plaintext_and_asks_for_keys_all_the_same(own: Path, tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "alice", None)
    security = SecuritySettings(tls=own, api_keys=tmp_path / "keys")
    access = open_access(settings(listen=f"unix:{tmp_path}/c", security=security))
    assert access.listener is None
    assert access.certificates
    assert isinstance(access.guard, ApiKeys)


def test_certificates_alone_do_not_say_who_is_an_operator(own: Path, tmp_path: Path) -> None:
    add_key(tmp_path / "keys", "alice", None)
    security = SecuritySettings(tls=own, require_caller_certificate=True)
    workers = {"workers": ("unix:/w",), "insecure": False}
    guard = open_access(settings(security=security, **workers)).guard
    assert guard is admit_callers
    context: Any = None
    with pytest.raises(Forbidden, match=r"Reshard is for operators.*--api-keys FILE"), guard(FOR_OPERATORS, context):
        pass
    with guard("/shardmesh.v1.Generation/Generate", context):
        pass
    # Whoever says --insecure allows what would be refused.
    assert open_access(settings(security=security)).guard is admit_all
    keys = SecuritySettings(tls=own, require_caller_certificate=True, api_keys=tmp_path / "keys")
    assert isinstance(open_access(settings(security=keys, **workers)).guard, ApiKeys)


def test_whoever_may_open_the_socket_file_is_an_operator(tmp_path: Path) -> None:
    access = open_access(settings(listen=f"unix:{tmp_path}/c", workers=("unix:/w",), insecure=False))
    assert access.guard is admit_all
