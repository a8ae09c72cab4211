"""Channel and server settings that both ends must share: versions, limits, keepalive, deadlines, addresses."""

from __future__ import annotations

import re

from protos.errors import InvalidArgument

PROTOCOL_VERSION = 4
"""Raised whenever a message of `shardworker.proto` or `plan.proto` changes its meaning."""

MAX_WORKER_REQUEST_BYTES = 64 * 1024 * 1024
"""Largest message to a worker: a prefill chunk or a plan."""

MAX_WORKER_REPLY_BYTES = 256 * 1024 * 1024
"""Largest message from a worker: all logits of many rows."""

MAX_CALLER_BYTES = 4 * 1024 * 1024
"""Largest message from or to a caller: a prompt."""

MAX_CANDIDATES = 1024
"""Most candidates that a shard gives for a row (`Head.num_candidates`); who needs more takes all logits."""

MAX_CONCURRENT_STREAMS = 1024
"""Calls that one connection may have open at once."""

HANDSHAKE_MS = 10_000
"""Longest that a connection may take until it speaks TLS and HTTP/2."""

DESCRIBE_DEADLINE_S = 5.0
LOAD_SILENCE_S = 20.0
"""Longest that a loading worker may send nothing; it sends a few messages a second, whether there is progress or not."""
LOAD_STALL_S = 300.0
"""Longest that a loading worker may make no progress: its disk or network hangs."""
MAX_SUPPLY_BYTES = 8 * 1024 * 1024
"""Most bytes of a checkpoint in one message to a loading worker."""
SUPPLY_SILENCE_S = 60.0
"""Longest that a loading worker waits for bytes that it asked its coordinator for."""
WARM_DEADLINE_S = 600.0
"""Longest that a spare may take to read the model's files."""

COORDINATOR_BYTES = 16
"""Of a coordinator's identity (`Open.coordinator`)."""

CANARY_S = 15.0
"""An idle coordinator sends a token through the mesh this often: a proof that it serves, and a sign of life to the workers."""
LEASE_S = 4 * CANARY_S
"""A worker ends a session that was silent for so long, or for what the coordinator said in `Open`, and frees its KV."""

KEEPALIVE_MS = 20_000
_KEEPALIVE = [
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The one that counts where the peer's socket takes the ping and nobody answers.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]


ROUND_TIMEOUT_S = 10.0
"""Longest that a round of a few rows may take on the slowest worker, unless the coordinator was told otherwise."""


def round_deadline_s(timeout_s: float, num_rows: int) -> float:
    """Longest that one round may take on the slowest worker, seconds: `timeout_s`, and more for many rows."""
    return timeout_s * (1 + num_rows / 40)


def lease_s(timeout_s: float, max_rows: int) -> float:
    """Longest silence of a sound session, seconds: its worker may have answered, and another one be awaited to the deadline."""
    return max(LEASE_S, 1.5 * round_deadline_s(timeout_s, max_rows))


def channel_options(*, max_send_bytes: int, max_receive_bytes: int) -> list[tuple[str, int]]:
    """Options of every client channel."""
    return [
        ("grpc.max_send_message_length", max_send_bytes),
        ("grpc.max_receive_message_length", max_receive_bytes),
        # Each channel is one peer: a shared connection pool would let one coordinator's sessions end with another's.
        ("grpc.use_local_subchannel_pool", 1),
        # A peer that comes back is found at once, not after gRPC's two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 1000),
        *_KEEPALIVE,
    ]


def server_options(*, max_send_bytes: int, max_receive_bytes: int) -> list[tuple[str, int]]:
    """Options of every server; its ping policy admits what `channel_options` sends."""
    return [
        ("grpc.max_send_message_length", max_send_bytes),
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
        # Who connects and says nothing is not kept for gRPC's two minutes.
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        # Two daemons on one port would share its connections at random.
        ("grpc.so_reuseport", 0),
        *_KEEPALIVE,
    ]


_PORT_LIMIT = 65536
_UNIX_PATH_LIMIT = 107  # sockaddr_un's, less the closing zero
_HOST_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(?P<port>[0-9]{1,5})")


def check_address(address: str, *, insecure: bool, tls: bool = False) -> str:
    """Return the address of a listener or peer unchanged if it may be used.

    Args:
        address: `host:port`, `[ipv6]:port` or `unix:PATH`.
        insecure: whether plain TCP was asked for.
        tls: whether TCP goes by TLS here.

    Raises:
        InvalidArgument: not an address, or TCP without TLS that nobody asked for.

    """
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        if not 0 < len(path.encode()) <= _UNIX_PATH_LIMIT:
            raise InvalidArgument(f"address {address!r} needs a path of 1 to {_UNIX_PATH_LIMIT} bytes after unix:")
        return address
    match = _HOST_PORT.fullmatch(address)
    if not match or int(match["port"]) >= _PORT_LIMIT:
        raise InvalidArgument(f"address {address!r} is neither HOST:PORT nor unix:PATH")
    if not insecure and not tls:
        raise InvalidArgument(
            f"address {address} is TCP without TLS: say --insecure to allow that, or use --tls DIR or a unix: socket"
        )
    return address


def check_metrics_address(address: str) -> str:
    """Return the address of a listener for metrics unchanged if it may be used; it needs no --insecure: only numbers are there.

    Raises:
        InvalidArgument: not an address, or a socket file, which Prometheus cannot scrape.

    """
    if address.startswith("unix:"):
        raise InvalidArgument(f"--metrics-listen must be HOST:PORT, which Prometheus can scrape, found {address}")
    return check_address(address, insecure=True)
