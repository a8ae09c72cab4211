"""Keys of callers: who gets in, how often, and what a file of keys must look like."""

import hashlib
import hmac
import stat
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from coordinator.api_keys import PREFIX, ApiKey, ApiKeys, add_key, read_keys
from protos import watched
from protos.errors import Forbidden, InvalidArgument, MeshError, TooManyCalls, Unauthenticated

GENERATE = "/shardmesh.v1.Generation/Generate"
GET_MODEL = "/shardmesh.v1.Generation/GetModel"
RESHARD = "/shardmesh.v1.Generation/Reshard"
HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class Context:
    def __init__(self, *metadata: tuple[str, str | bytes]) -> None:
        self.metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self.metadata


def bearer(key: str, scheme: str = "Bearer") -> Any:
    return Context(("user-agent", "x"), ("authorization", f"{scheme} {key}"))


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def enter(keys: ApiKeys, method: str, context: Any) -> MeshError | None:
    try:
        with keys(method, context):
            return None
    except MeshError as error:
        return error


def test_a_key_is_random_and_only_its_hash_is_kept(path: Path) -> None:
    alice, bob = add_key(path, "alice", 4), add_key(path, "bob", None)
    assert alice != bob
    for key in (alice, bob):
        assert key.startswith(PREFIX)
        # 32 bytes in base64.
        assert len(key.removeprefix(PREFIX)) == 43
        assert key not in path.read_text()
    assert path.read_text() == f"alice {digest(alice)} 4\nbob {digest(bob)} -\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_keys(path) == (
        ApiKey("alice", bytes.fromhex(digest(alice)), 4),
        ApiKey("bob", bytes.fromhex(digest(bob)), None),
    )


def test_a_line_is_appended_to_what_people_wrote_and_the_file_becomes_private(path: Path) -> None:
    path.write_text(f"# ours\n\n  carol\t{digest('c').upper()}  1  # not a comment".replace("  # not a comment", ""))
    path.chmod(0o644)
    add_key(path, "dave", None)
    assert [(key.name, key.max_calls) for key in read_keys(path)] == [("carol", 1), ("dave", None)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_name_has_one_key(path: Path) -> None:
    add_key(path, "alice", None)
    before = path.read_text()
    with pytest.raises(InvalidArgument, match="alice has a key already"):
        add_key(path, "alice", 3)
    assert path.read_text() == before


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "x" * 65, "ä", "#a"])
def test_what_cannot_be_a_name_is_refused(path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="a key's name has 1 to 64 letters"):
        add_key(path, name, None)
    assert not path.exists()


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be written: No such file"):
        add_key(tmp_path / "none" / "keys", "alice", None)


SECRET = "shardmesh_this-is-the-key-itself"  # noqa: S105  # of nothing


@pytest.mark.parametrize(
    "line",
    [
        f"alice {SECRET} 4",
        f"{SECRET}",
        f"alice {digest(SECRET)}",
        f"alice {digest(SECRET)} 0",
        f"alice {digest(SECRET)} -1",
        f"alice {digest(SECRET)} 1.5",
        f"alice {digest(SECRET)[:-1]} 1",
        f"alice {digest(SECRET)} 1 more",
        f"alice {digest(SECRET)} operator",
        f"alice {digest(SECRET)} 1operator",
        f"alice {digest(SECRET)} 1 Operator",
        f"alice {digest(SECRET)} 1 operator more",
    ],
)
def test_a_line_that_is_none_is_named_by_its_number_and_never_shown(path: Path, line: str) -> None:
    path.write_text(f"# fine\n{line}\n")
    with pytest.raises(InvalidArgument, match="line 2 is not NAME SHA256 LIMIT") as raised:
        read_keys(path)
    assert SECRET not in str(raised.value)
    assert digest(SECRET)[:-1] not in str(raised.value)


@pytest.mark.parametrize("second", [f"alice {digest('b')} 1", f"bob {digest('a')} 1"])
def test_a_name_or_a_key_twice_is_refused(path: Path, second: str) -> None:
    path.write_text(f"alice {digest('a')} 1\n{second}\n")
    with pytest.raises(InvalidArgument, match="line 2 has the name or the key of an earlier line"):
        read_keys(path)


@pytest.mark.parametrize(
    ("data", "text"),
    [(None, "cannot be read"), (b"\xff\xfe", "not a text file"), (b"# nobody\n", "make one with coordctl api-key")],
)
def test_a_file_without_keys_is_refused_at_the_start(path: Path, data: bytes | None, text: str) -> None:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InvalidArgument, match=text):
        ApiKeys(path)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("method", [GENERATE, GET_MODEL, REFLECTION])
def test_a_known_key_gets_in(path: Path, method: str, scheme: str) -> None:
    key = add_key(path, "alice", None)
    assert enter(ApiKeys(path), method, bearer(key, scheme)) is None


@pytest.mark.parametrize("method", [GENERATE, GET_MODEL, REFLECTION, "/grpc.health.v1.HealthX/Check", "/other/Method"])
@pytest.mark.parametrize(
    ("context", "text"),
    [
        (Context(), "no API key: send it as metadata, authorization: Bearer KEY"),
        (Context(("x-api-key", "k")), "no API key"),
        (bearer("wrong"), "not known here"),
        (bearer(""), "not known here"),
        (bearer("alice"), "not known here"),
        (bearer("k", "Basic"), "as Bearer KEY"),
        (Context(("authorization", "Bearer")), "as Bearer KEY"),
        (Context(("authorization", b"\xff")), "as Bearer KEY"),
        (Context(("authorization", "Bearer k"), ("authorization", "Bearer k")), "must be there once"),
    ],
)
def test_everybody_else_stays_outside(path: Path, method: str, context: Any, text: str) -> None:
    add_key(path, "alice", None)
    error = enter(ApiKeys(path), method, context)
    assert isinstance(error, Unauthenticated)
    assert text in str(error)


def test_the_hash_of_a_key_is_no_key(path: Path) -> None:
    key = add_key(path, "alice", None)
    assert isinstance(enter(ApiKeys(path), GENERATE, bearer(digest(key))), Unauthenticated)


def test_health_is_open(path: Path) -> None:
    add_key(path, "alice", None)
    assert enter(ApiKeys(path), HEALTH, Context()) is None


def test_every_entry_is_compared_in_constant_time_whichever_matches(path: Path) -> None:
    first = add_key(path, "first", None)
    for name in ("second", "third"):
        add_key(path, name, None)
    keys = ApiKeys(path)
    for shown in (first, "wrong"):
        with mock.patch("hmac.compare_digest", side_effect=hmac.compare_digest) as compare:
            enter(keys, GET_MODEL, bearer(shown))
        assert compare.call_count == 3


def test_an_operators_key_may_change_the_mesh_and_others_may_not(path: Path) -> None:
    alice, olga = bearer(add_key(path, "alice", None)), bearer(add_key(path, "olga", 2, is_operator=True))
    assert [(key.name, key.max_calls, key.is_operator) for key in read_keys(path)] == [("alice", None, False), ("olga", 2, True)]
    keys = ApiKeys(path)
    error = enter(keys, RESHARD, alice)
    assert isinstance(error, Forbidden)
    assert "Reshard needs an operator's API key, found that of alice" in str(error)
    assert enter(keys, RESHARD, olga) is None
    assert isinstance(enter(keys, RESHARD, Context()), Unauthenticated)
    assert isinstance(enter(keys, RESHARD, bearer("wrong")), Unauthenticated)


def test_an_operators_key_is_a_callers_key_too(path: Path) -> None:
    olga = bearer(add_key(path, "olga", 1, is_operator=True))
    keys = ApiKeys(path)
    with keys(GENERATE, olga):
        assert enter(keys, GET_MODEL, olga) is None
        assert isinstance(enter(keys, GENERATE, olga), TooManyCalls)


def test_an_operator_is_one_as_long_as_the_file_says_so(path: Path) -> None:
    key = add_key(path, "olga", None)
    keys = ApiKeys(path)
    assert isinstance(enter(keys, RESHARD, bearer(key)), Forbidden)
    path.write_text(f"olga {digest(key)} -   operator  \n")
    assert enter(keys, RESHARD, bearer(key)) is None
    path.write_text(f"olga {digest(key)} -\n")
    assert isinstance(enter(keys, RESHARD, bearer(key)), Forbidden)


def test_a_limit_counts_the_generate_calls_of_its_own_key(path: Path) -> None:
    alice, bob = bearer(add_key(path, "alice", 2)), bearer(add_key(path, "bob", None))
    keys = ApiKeys(path)
    with keys(GENERATE, alice), keys(GENERATE, alice):
        error = enter(keys, GENERATE, alice)
        assert isinstance(error, TooManyCalls)
        assert "alice has 2 calls under way, as many as its API key allows" in str(error)
        assert enter(keys, GET_MODEL, alice) is None
        with keys(GENERATE, bob), keys(GENERATE, bob), keys(GENERATE, bob):
            pass
    assert enter(keys, GENERATE, alice) is None


def test_a_call_that_fails_is_no_longer_under_way(path: Path) -> None:
    alice = bearer(add_key(path, "alice", 1))
    keys = ApiKeys(path)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), keys(GENERATE, alice):
            raise ZeroDivisionError
    assert enter(keys, GENERATE, alice) is None


def test_the_file_is_read_again_and_calls_under_way_still_count(path: Path) -> None:
    alice = bearer(add_key(path, "alice", 1))
    keys = ApiKeys(path)
    with keys(GENERATE, alice):
        bob = bearer(add_key(path, "bob", None))
        assert enter(keys, GENERATE, bob) is None
        assert isinstance(enter(keys, GENERATE, alice), TooManyCalls)
        path.write_text("# everybody out\n")
        assert isinstance(enter(keys, GENERATE, bob), Unauthenticated)
    assert isinstance(enter(keys, GENERATE, alice), Unauthenticated)


def test_a_broken_file_keeps_the_old_keys_and_logs_one_line_without_secrets(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = mock.Mock()
    monkeypatch.setattr(watched, "log", log)
    alice = bearer(add_key(path, "alice", None))
    keys = ApiKeys(path)
    path.write_text(f"alice {SECRET} 1\n")
    assert enter(keys, GENERATE, alice) is None
    assert enter(keys, GENERATE, alice) is None
    log.warning.assert_called_once()
    assert SECRET not in str(log.mock_calls)
    assert "line 1 is not NAME" in log.warning.call_args.kwargs["error"]
