"""Addresses that may be used, and channel settings of both ends that must fit each other."""

import pytest

from protos import rpc
from protos.errors import InvalidArgument
from protos.rpc import channel_options, check_address, lease_s, round_deadline_s, server_options

LIMITS = {"max_send_bytes": 5, "max_receive_bytes": 7}


@pytest.mark.parametrize(
    "address", ["localhost:1", "10.0.0.1:65535", "worker-0.mesh.svc:50051", "[::1]:8000", "[fe80::1%2]:8000", "0.0.0.0:0"]
)
def test_tcp_is_allowed_only_if_it_was_asked_for(address: str) -> None:
    assert check_address(address, insecure=True) == address
    assert check_address(address, insecure=False, tls=True) == address
    with pytest.raises(InvalidArgument, match="say --insecure to allow that, or use --tls DIR or a unix: socket"):
        check_address(address, insecure=False)


@pytest.mark.parametrize("path", ["s", "/run/s", "/" + "x" * 106, "/" + "é" * 53, "/with space:colon"])
def test_a_unix_socket_needs_nothing(path: str) -> None:
    assert check_address(f"unix:{path}", insecure=False) == f"unix:{path}"


@pytest.mark.parametrize("path", ["", "/" + "x" * 107, "/" + "é" * 54])
def test_a_unix_path_must_fit_the_kernels_field(path: str) -> None:
    with pytest.raises(InvalidArgument, match="1 to 107 bytes"):
        check_address(f"unix:{path}", insecure=True)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "localhost",
        ":50051",
        "localhost:",
        "localhost:65536",
        "localhost:99999",
        "localhost:123456",
        "localhost:-1",
        "localhost:+1",
        "localhost:1 ",
        " localhost:1",
        "local host:1",
        "localhost:http",
        "localhost:1\n",
        "localhost:٣",
        "::1:8000",
        "[::1]",
        "[]:1",
        "[host]:1",
        "http://localhost:1",
        "dns:///localhost:1",
        "a:1,b:2",
    ],
)
def test_what_is_no_address_is_refused_with_what_was_wanted(address: str) -> None:
    with pytest.raises(InvalidArgument, match="HOST:PORT"):
        check_address(address, insecure=True)


def test_limits_reach_the_options_of_both_ends() -> None:
    for options in (dict(channel_options(**LIMITS)), dict(server_options(**LIMITS))):
        assert options["grpc.max_send_message_length"] == 5
        assert options["grpc.max_receive_message_length"] == 7


def test_the_server_admits_the_pings_that_the_client_sends() -> None:
    client, server = dict(channel_options(**LIMITS)), dict(server_options(**LIMITS))
    assert client["grpc.keepalive_time_ms"] >= server["grpc.http2.min_ping_interval_without_data_ms"]


def test_a_reply_may_be_as_big_as_the_largest_head() -> None:
    rows, vocabulary, float_bytes = 64, 256_000, 4
    assert rows * vocabulary * float_bytes <= rpc.MAX_WORKER_REPLY_BYTES


def test_more_rows_get_more_time() -> None:
    # A worker that has answered may be silent as long as another one may take.
    assert all(lease_s(timeout_s, 512) > round_deadline_s(timeout_s, 512) for timeout_s in (0.1, 10, 100))
    assert 10 < round_deadline_s(10, 1) < 11 < round_deadline_s(10, 512) < 600
