"""What a coordinator is told: one frozen object for the model, one for the service."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from coordinator.discovery.target import read_lease, read_target
from protos import rpc
from protos.errors import InvalidArgument
from protos.plan_pb2 import QUANTIZATION_INT4, QUANTIZATION_INT8, QUANTIZATION_NONE, Quantization
from protos.tensor_pb2 import DTYPE_BF16, DTYPE_F16, DTYPE_F32, DTYPE_INT8_BLOCK32, DType

if TYPE_CHECKING:
    from pathlib import Path

DTYPES: dict[str, DType] = {"f32": DTYPE_F32, "bf16": DTYPE_BF16, "f16": DTYPE_F16}
QUANTIZATIONS: dict[str, Quantization] = {"none": QUANTIZATION_NONE, "int8": QUANTIZATION_INT8, "int4": QUANTIZATION_INT4}
WIRES: dict[str, DType] = {"f32": DTYPE_F32, "bf16": DTYPE_BF16, "int8": DTYPE_INT8_BLOCK32}
DEVICES = ("auto", "cpu", "cuda")
WEIGHTS = ("shared", "stream")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Which model, and in which arithmetic."""

    model: str
    """Folder or hub id."""
    dtype: str = "auto"
    """Key of `DTYPES`, or "auto" for the checkpoint's own."""
    quantization: str = "none"
    """Key of `QUANTIZATIONS`."""
    wire: str = "bf16"
    """Key of `WIRES`."""
    random_weights: bool = False
    """Draw weights at random; only config.json is needed."""


@dataclass(frozen=True, slots=True)
class SecuritySettings:
    """By what a coordinator is known, and whom it lets in; folders as in `protos.tls`."""

    tls: Path | None = None
    """The coordinator's own certificate: for workers reached by TCP, and for callers unless they see another."""
    caller_tls: Path | None = None
    """What callers see instead."""
    require_caller_certificate: bool = False
    """Whether callers must show a certificate of the CA."""
    api_keys: Path | None = None
    """File of `coordinator.api_keys`: callers must show one."""


@dataclass(frozen=True, slots=True)
class DiscoverySettings:
    """How workers are found and waited for, and how they are shared with other coordinators."""

    discover: str | None = None
    """Where workers are found, as in `coordinator.discovery.target`; None: they are listed."""
    lease: str | None = None
    """NAMESPACE/NAME of the Lease whose holder hands out plans; None: this coordinator does."""
    startup_s: float | None = 0.0
    """How long enough workers are waited for at the start, seconds; None: for ever."""


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """How a coordinator serves.

    Raises:
        InvalidArgument: no, duplicate or malformed workers, a number out of range, a door left open without --insecure.

    """

    model: ModelSettings
    listen: str
    workers: tuple[str, ...] = ()
    """Addresses, spares included; none where they are discovered."""
    insecure: bool = False
    """Whether TCP without TLS, and callers that nobody knows, are allowed."""
    security: SecuritySettings = SecuritySettings()
    discovery: DiscoverySettings = DiscoverySettings()
    health_listen: str | None = None
    """A second address, for health alone and in plaintext."""
    metrics_listen: str | None = None
    """HOST:PORT of plain HTTP for Prometheus; None: nothing is recorded for it."""
    trace_to: str | None = None
    """http://HOST:PORT or https://HOST:PORT of an OpenTelemetry collector; None: no traces are made."""
    shards: int | None = None
    """None: the largest power of two that the workers allow."""
    kv_tokens: int | None = None
    """Tokens of KV cache; None: what is usual and fits."""
    max_rows: int = 512
    max_running: int = 64
    max_waiting: int = 256
    recovery_s: float = 60.0
    """How long requests wait for another mesh when theirs breaks, seconds."""
    round_timeout_s: float = rpc.ROUND_TIMEOUT_S
    """Longest that a round of a few rows may take on the slowest worker, seconds."""
    warm_spares: bool = False
    """Whether workers beyond the shards read the model's files into memory."""
    weights: str = "shared"
    """One of `WEIGHTS`: workers see the model's folder, or the coordinator sends them what they need of it."""

    def __post_init__(self) -> None:
        """Check everything that needs no network."""
        self._check_listeners()
        self._check_workers()
        for name in ("max_rows", "max_running", "max_waiting", "kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} must be >= 1, found {value}")
        for name in ("recovery_s", "round_timeout_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidArgument(f"{name} must be a number of seconds, found {getattr(self, name)}")
        if self.weights not in WEIGHTS:
            raise InvalidArgument(f"weights must be one of {', '.join(WEIGHTS)}, found {self.weights!r}")
        if self.warm_spares and self.weights == "stream":
            raise InvalidArgument("--warm-spares reads files that the spares see, with --weights stream they see none: drop one")
        if self.max_running > self.max_rows:
            raise InvalidArgument(f"max_running is {self.max_running}: a step of max_rows {self.max_rows} has no row for each")

    def _check_workers(self) -> None:
        tls = self.security.tls is not None
        if self.discovery.lease:
            read_lease(self.discovery.lease)
        if self.discovery.discover:
            read_target(self.discovery.discover)
            if self.workers:
                raise InvalidArgument("workers are listed and to be discovered: give --workers or --discover, not both")
            if not self.shards and not self.discovery.lease:
                raise InvalidArgument(
                    "--discover needs --shards, or a --lease that says it: how many workers there will be is not known before"
                )
            if not tls and not self.insecure:
                raise InvalidArgument("workers that are discovered are reached by TCP: give --tls DIR, or say --insecure")
            return
        if not self.workers:
            raise InvalidArgument("no workers: --workers needs at least one address, or --discover says where they are found")
        for address in self.workers:
            rpc.check_address(address, insecure=self.insecure, tls=tls)
            if self.workers.count(address) > 1:
                raise InvalidArgument(f"worker {address} is listed {self.workers.count(address)} times")
        if self.shards is not None and not 1 <= self.shards <= len(self.workers):
            raise InvalidArgument(f"--shards {self.shards} needs that many workers, {len(self.workers)} are listed")

    def _check_listeners(self) -> None:
        security = self.security
        by_tls = bool(security.tls or security.caller_tls)
        rpc.check_address(self.listen, insecure=self.insecure, tls=by_tls)
        if self.health_listen:
            rpc.check_address(self.health_listen, insecure=True)
        if self.metrics_listen:
            rpc.check_metrics_address(self.metrics_listen)
        if self.trace_to:
            _check_collector(self.trace_to)
        is_socket_file = self.listen.startswith("unix:")
        if is_socket_file and (security.caller_tls or security.require_caller_certificate):
            raise InvalidArgument(
                f"--listen {self.listen} is a socket file, which has no certificates: "
                "leave out --caller-tls and --require-caller-certificate, or listen on HOST:PORT"
            )
        if security.require_caller_certificate and not by_tls:
            raise InvalidArgument("--require-caller-certificate needs TLS: give --tls DIR or --caller-tls DIR")
        closed = is_socket_file or security.api_keys or security.require_caller_certificate
        if not closed and not self.insecure:
            raise InvalidArgument(
                f"--listen {self.listen} would let in everybody: give --api-keys FILE or --require-caller-certificate, "
                "or say --insecure to allow that"
            )


def _check_collector(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_sound = parts.scheme in {"http", "https"} and parts.hostname and parts.port and parts.path in {"", "/"}
    except ValueError:
        is_sound = False
    if not is_sound or parts.username or parts.query or parts.fragment:
        raise InvalidArgument(
            f"--trace-to (or OTEL_EXPORTER_OTLP_ENDPOINT) takes http://HOST:PORT, or https://HOST:PORT for TLS, found {url!r}"
        )
