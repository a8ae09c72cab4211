"""What can go wrong, once, for both ends of the wire.

    MeshError
    +-- InvalidArgument      the caller must change the request
    +-- ModelError           the model's files are missing, damaged or ask for something not supported
    +-- TopologyError        the model cannot be cut or placed like this: other shards, other workers
    +-- PlanMismatch         the worker holds another plan, or none: load it
    +-- ProtocolMismatch     the two ends are of different versions: upgrade one
    +-- StaleEpoch           the mesh has moved on: describe the workers and adopt their epoch
    +-- PositionMismatch     the worker holds another number of tokens of a sequence: begin it anew
    +-- StepMismatch         rounds came out of order: begin the step anew
    +-- OutOfMemory          weights or KV do not fit: less of either, or more workers
    +-- QueueFull            too many requests wait: retry later
    +-- TooManyCalls         an API key has as many calls under way as it may: retry later
    +-- Unauthenticated      the caller showed no API key, or none that is known
    +-- Forbidden            the peer is known, and its certificate or API key is for something else
    +-- WorkerLost           a worker died, hangs or broke its stream
    +-- NotServing           no full mesh: retry later
    +-- WrongResult          a worker answered something that cannot be right

Each class carries a canonical status code and a stable reason. Servicers raise; `protos.interceptors` turns a raised error
into a status with a `google.rpc.ErrorInfo`, and a `google.rpc.RetryInfo` where trying again helps; `from_rpc_error` turns it
back into the same class.
"""

from __future__ import annotations

from typing import ClassVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

ERROR_DOMAIN = "shardmesh"

MAX_TEXT_BYTES = 1500
"""UTF-8 bytes of an error's text that cross the wire."""

_PEER_IS_GONE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    # What grpc.aio makes of a write into a connection that breaks just then; our own INTERNAL has a reason.
    grpc.StatusCode.INTERNAL,
)


class MeshError(Exception):
    """Base of all; its text says what was wanted, what was found and what to do."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    retry_s: ClassVar[float | None] = None
    """After how many seconds the same call may succeed; None: not by trying again."""

    def __init__(self, text: str, *, shards: tuple[int, ...] = ()) -> None:
        """Say what is wrong.

        Args:
            text: what was wanted, what was found, what to do.
            shards: of the mesh, whose workers are to blame; stays in this process.

        """
        super().__init__(text)
        self.shards = shards
        self.details: tuple[Message, ...] = ()
        """Further messages for the status that a caller gets."""


class InvalidArgument(MeshError):
    """The caller must change the request."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "INVALID_ARGUMENT"


class ModelError(MeshError):
    """The model's files are missing, damaged, or ask for something that is not supported."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_UNUSABLE"


class TopologyError(MeshError):
    """The model cannot be cut or placed like this."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "TOPOLOGY"


class PlanMismatch(MeshError):
    """The worker holds another plan, or none."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "PLAN_MISMATCH"


class ProtocolMismatch(MeshError):
    """The two ends speak different versions of the protocol."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "PROTOCOL_MISMATCH"


class StaleEpoch(MeshError):
    """The mesh has moved on to a higher epoch."""

    code = grpc.StatusCode.ABORTED
    reason = "STALE_EPOCH"


class PositionMismatch(MeshError):
    """The worker holds another number of tokens of a sequence."""

    code = grpc.StatusCode.ABORTED
    reason = "POSITION_MISMATCH"


class StepMismatch(MeshError):
    """A round came out of order."""

    code = grpc.StatusCode.ABORTED
    reason = "STEP_MISMATCH"


class OutOfMemory(MeshError):
    """Weights or KV cache do not fit."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "OUT_OF_MEMORY"


class QueueFull(MeshError):
    """Too many requests wait already."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"
    retry_s = 2.0


class TooManyCalls(MeshError):
    """An API key has as many calls under way as it may."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "TOO_MANY_CALLS"
    retry_s = 1.0


class Unauthenticated(MeshError):
    """The caller showed no API key, or none that is known."""

    code = grpc.StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class Forbidden(MeshError):
    """The peer's certificate or API key does not allow this call."""

    code = grpc.StatusCode.PERMISSION_DENIED
    reason = "PERMISSION_DENIED"


class WorkerLost(MeshError):
    """A worker died, hangs or broke its stream."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "WORKER_LOST"


class NotServing(MeshError):
    """There is no full mesh at present."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NOT_SERVING"
    retry_s = 1.0


class WrongResult(MeshError):
    """A worker answered something that cannot be right."""

    code = grpc.StatusCode.INTERNAL
    reason = "WRONG_RESULT"


ERRORS: dict[str, type[MeshError]] = {
    error.reason: error
    for error in (
        MeshError,
        InvalidArgument,
        ModelError,
        TopologyError,
        PlanMismatch,
        ProtocolMismatch,
        StaleEpoch,
        PositionMismatch,
        StepMismatch,
        OutOfMemory,
        QueueFull,
        TooManyCalls,
        Unauthenticated,
        Forbidden,
        WorkerLost,
        NotServing,
        WrongResult,
    )
}
"""The one table between reasons on the wire and classes in the program."""


def to_status(error: MeshError) -> grpc.Status:
    """Make the gRPC status of an error, with its `ErrorInfo` and, where it helps to try again, a `RetryInfo`."""
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)]
    if error.retry_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    details += error.details
    number: int = error.code.value[0]
    return rpc_status.to_status(
        status_pb2.Status(code=number, message=_shorten(str(error)), details=[_pack(one) for one in details])
    )


def _pack(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _shorten(text: str) -> str:
    # A status travels in header metadata, once percent-encoded (up to 3 bytes a byte) and once in base64; beyond 8 KiB the
    # whole answer may be dropped. Paths from the command line can hold surrogates, which UTF-8 has not.
    data = text.encode(errors="replace")
    if len(data) <= MAX_TEXT_BYTES:
        return data.decode()
    return data[: MAX_TEXT_BYTES - 3].decode(errors="ignore") + "..."


def error_reason(error: grpc.aio.AioRpcError) -> str | None:
    """Read the stable reason from a failed call, if a shardmesh service gave one."""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):
        # Details of another status: gRPC failed the call on the way, or the peer is none of ours.
        return None
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            return str(info.reason)
    return None


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str) -> MeshError:
    """Turn a failed call back into the error that its server raised.

    Without a reason of ours, codes that say that nobody served the call mean that `peer` is lost; any other (a message over
    the limit, an unknown method) is a plain `MeshError`, because another peer would answer the same.
    """
    text = f"{peer}: {error.details() or error.code().name}"
    if (reason := error_reason(error)) in ERRORS:
        return ERRORS[reason](text)
    return WorkerLost(text) if error.code() in _PEER_IS_GONE else MeshError(text)
