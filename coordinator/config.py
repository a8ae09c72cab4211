"""What a coordinator is told: one frozen object for the model, one for the service."""

from __future__ import annotations

from dataclasses import dataclass, field

from protos import rpc
from protos.errors import InvalidArgument
from protos.plan_pb2 import QUANTIZATION_INT4, QUANTIZATION_INT8, QUANTIZATION_NONE, Quantization
from protos.tensor_pb2 import DTYPE_BF16, DTYPE_F16, DTYPE_F32, DTYPE_INT8_BLOCK32, DType

DTYPES: dict[str, DType] = {"f32": DTYPE_F32, "bf16": DTYPE_BF16, "f16": DTYPE_F16}
QUANTIZATIONS: dict[str, Quantization] = {"none": QUANTIZATION_NONE, "int8": QUANTIZATION_INT8, "int4": QUANTIZATION_INT4}
WIRES: dict[str, DType] = {"f32": DTYPE_F32, "bf16": DTYPE_BF16, "int8": DTYPE_INT8_BLOCK32}
DEVICES = ("auto", "cpu", "cuda")


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
class ServeSettings:
    """How a coordinator serves.

    Raises:
        InvalidArgument: no, duplicate or malformed workers, a number out of range.

    """

    model: ModelSettings
    listen: str
    workers: tuple[str, ...]
    insecure: bool = False
    shards: int | None = None
    """None: the largest power of two that the workers allow."""
    kv_tokens: int | None = None
    """Tokens of KV cache; None: what is usual and fits."""
    max_rows: int = 512
    max_running: int = 64
    max_waiting: int = 256
    recovery_s: float = field(default=60.0)
    """How long requests wait for another mesh when theirs breaks, seconds."""

    def __post_init__(self) -> None:
        """Check everything that needs no network."""
        rpc.check_address(self.listen, insecure=self.insecure)
        if not self.workers:
            raise InvalidArgument("no workers: --workers needs at least one address")
        for address in self.workers:
            rpc.check_address(address, insecure=self.insecure)
            if self.workers.count(address) > 1:
                raise InvalidArgument(f"worker {address} is listed {self.workers.count(address)} times")
        if self.shards is not None and not 1 <= self.shards <= len(self.workers):
            raise InvalidArgument(f"--shards {self.shards} needs that many workers, {len(self.workers)} are listed")
        for name in ("max_rows", "max_running", "max_waiting", "kv_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgument(f"{name} must be >= 1, found {value}")
        if self.max_running > self.max_rows:
            raise InvalidArgument(f"max_running is {self.max_running}: a step of max_rows {self.max_rows} has no row for each")
