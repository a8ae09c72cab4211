from protos import plan_pb2 as _plan_pb2
from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_EMPTY: _ClassVar[WorkerState]
    WORKER_STATE_LOADING: _ClassVar[WorkerState]
    WORKER_STATE_LOADED: _ClassVar[WorkerState]
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_EMPTY: WorkerState
WORKER_STATE_LOADING: WorkerState
WORKER_STATE_LOADED: WorkerState

class Held(_message.Message):
    __slots__ = ("state", "plan_digest", "shard", "assignment", "former")
    STATE_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    FORMER_FIELD_NUMBER: _ClassVar[int]
    state: WorkerState
    plan_digest: bytes
    shard: int
    assignment: int
    former: _containers.RepeatedCompositeFieldContainer[FormerPlan]
    def __init__(self, state: _Optional[_Union[WorkerState, str]] = ..., plan_digest: _Optional[bytes] = ..., shard: _Optional[int] = ..., assignment: _Optional[int] = ..., former: _Optional[_Iterable[_Union[FormerPlan, _Mapping]]] = ...) -> None: ...

class FormerPlan(_message.Message):
    __slots__ = ("plan_digest", "shard")
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    plan_digest: bytes
    shard: int
    def __init__(self, plan_digest: _Optional[bytes] = ..., shard: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("protocol_version", "version", "held", "device", "num_threads", "memory_total_bytes", "memory_free_bytes", "weights_bytes", "peak_rss_bytes", "num_sessions", "kv_bytes", "kernels")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NUM_THREADS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    version: str
    held: Held
    device: str
    num_threads: int
    memory_total_bytes: int
    memory_free_bytes: int
    weights_bytes: int
    peak_rss_bytes: int
    num_sessions: int
    kv_bytes: int
    kernels: str
    def __init__(self, protocol_version: _Optional[int] = ..., version: _Optional[str] = ..., held: _Optional[_Union[Held, _Mapping]] = ..., device: _Optional[str] = ..., num_threads: _Optional[int] = ..., memory_total_bytes: _Optional[int] = ..., memory_free_bytes: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., peak_rss_bytes: _Optional[int] = ..., num_sessions: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., kernels: _Optional[str] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("protocol_version", "plan", "shard_digests", "assignment", "directory", "supplied", "beside")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SHARD_DIGESTS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    SUPPLIED_FIELD_NUMBER: _ClassVar[int]
    BESIDE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    plan: _plan_pb2.ShardPlan
    shard_digests: _containers.RepeatedScalarFieldContainer[bytes]
    assignment: int
    directory: str
    supplied: bool
    beside: bool
    def __init__(self, protocol_version: _Optional[int] = ..., plan: _Optional[_Union[_plan_pb2.ShardPlan, _Mapping]] = ..., shard_digests: _Optional[_Iterable[bytes]] = ..., assignment: _Optional[int] = ..., directory: _Optional[str] = ..., supplied: _Optional[bool] = ..., beside: _Optional[bool] = ...) -> None: ...

class LoadProgress(_message.Message):
    __slots__ = ("loaded_bytes", "total_bytes")
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    loaded_bytes: int
    total_bytes: int
    def __init__(self, loaded_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ...) -> None: ...

class Loaded(_message.Message):
    __slots__ = ("held", "weights_bytes", "already_held", "load_ns")
    HELD_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    ALREADY_HELD_FIELD_NUMBER: _ClassVar[int]
    LOAD_NS_FIELD_NUMBER: _ClassVar[int]
    held: Held
    weights_bytes: int
    already_held: bool
    load_ns: int
    def __init__(self, held: _Optional[_Union[Held, _Mapping]] = ..., weights_bytes: _Optional[int] = ..., already_held: _Optional[bool] = ..., load_ns: _Optional[int] = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("progress", "loaded")
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    progress: LoadProgress
    loaded: Loaded
    def __init__(self, progress: _Optional[_Union[LoadProgress, _Mapping]] = ..., loaded: _Optional[_Union[Loaded, _Mapping]] = ...) -> None: ...

class SupplyRequest(_message.Message):
    __slots__ = ("offer", "bytes")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    offer: SupplyOffer
    bytes: SuppliedBytes
    def __init__(self, offer: _Optional[_Union[SupplyOffer, _Mapping]] = ..., bytes: _Optional[_Union[SuppliedBytes, _Mapping]] = ...) -> None: ...

class SupplyOffer(_message.Message):
    __slots__ = ("protocol_version", "plan_digest", "shard")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    plan_digest: bytes
    shard: int
    def __init__(self, protocol_version: _Optional[int] = ..., plan_digest: _Optional[bytes] = ..., shard: _Optional[int] = ...) -> None: ...

class SuppliedBytes(_message.Message):
    __slots__ = ("number", "data", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    data: bytes
    error: str
    def __init__(self, number: _Optional[int] = ..., data: _Optional[bytes] = ..., error: _Optional[str] = ...) -> None: ...

class SupplyResponse(_message.Message):
    __slots__ = ("number", "file", "offset", "length", "count", "pitch")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    PITCH_FIELD_NUMBER: _ClassVar[int]
    number: int
    file: str
    offset: int
    length: int
    count: int
    pitch: int
    def __init__(self, number: _Optional[int] = ..., file: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., count: _Optional[int] = ..., pitch: _Optional[int] = ...) -> None: ...

class WarmRequest(_message.Message):
    __slots__ = ("protocol_version", "directory", "files")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    directory: str
    files: _containers.RepeatedCompositeFieldContainer[_plan_pb2.CheckpointFile]
    def __init__(self, protocol_version: _Optional[int] = ..., directory: _Optional[str] = ..., files: _Optional[_Iterable[_Union[_plan_pb2.CheckpointFile, _Mapping]]] = ...) -> None: ...

class WarmResponse(_message.Message):
    __slots__ = ("file_bytes",)
    FILE_BYTES_FIELD_NUMBER: _ClassVar[int]
    file_bytes: int
    def __init__(self, file_bytes: _Optional[int] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("assignment",)
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    assignment: int
    def __init__(self, assignment: _Optional[int] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("held",)
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: Held
    def __init__(self, held: _Optional[_Union[Held, _Mapping]] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("plan_digest", "epoch", "step", "round", "batch", "open", "project", "attend", "feed_forward", "head")
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    OPEN_FIELD_NUMBER: _ClassVar[int]
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    ATTEND_FIELD_NUMBER: _ClassVar[int]
    FEED_FORWARD_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    plan_digest: bytes
    epoch: int
    step: int
    round: int
    batch: Batch
    open: Open
    project: Project
    attend: Attend
    feed_forward: FeedForward
    head: Head
    def __init__(self, plan_digest: _Optional[bytes] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., round: _Optional[int] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ..., open: _Optional[_Union[Open, _Mapping]] = ..., project: _Optional[_Union[Project, _Mapping]] = ..., attend: _Optional[_Union[Attend, _Mapping]] = ..., feed_forward: _Optional[_Union[FeedForward, _Mapping]] = ..., head: _Optional[_Union[Head, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol_version", "num_pages", "coordinator", "lease_ms")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    num_pages: int
    coordinator: bytes
    lease_ms: int
    def __init__(self, protocol_version: _Optional[int] = ..., num_pages: _Optional[int] = ..., coordinator: _Optional[bytes] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("sequences", "released")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[SequenceRows]
    released: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequences: _Optional[_Iterable[_Union[SequenceRows, _Mapping]]] = ..., released: _Optional[_Iterable[int]] = ...) -> None: ...

class SequenceRows(_message.Message):
    __slots__ = ("sequence", "position", "num_rows", "pages", "prompt_tokens")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    position: int
    num_rows: int
    pages: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    def __init__(self, sequence: _Optional[int] = ..., position: _Optional[int] = ..., num_rows: _Optional[int] = ..., pages: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class Project(_message.Message):
    __slots__ = ("layer", "hidden")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    layer: int
    hidden: _tensor_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., hidden: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Attend(_message.Message):
    __slots__ = ("layer", "hidden", "squares")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    hidden: _tensor_pb2.Tensor
    squares: _tensor_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., hidden: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., squares: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class FeedForward(_message.Message):
    __slots__ = ("layer", "hidden", "experts", "expert_weights", "shared_weights")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SHARED_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    hidden: _tensor_pb2.Tensor
    experts: _tensor_pb2.Tensor
    expert_weights: _tensor_pb2.Tensor
    shared_weights: _tensor_pb2.Tensor
    def __init__(self, layer: _Optional[int] = ..., hidden: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., experts: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., expert_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., shared_weights: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Head(_message.Message):
    __slots__ = ("hidden", "num_candidates", "temperatures", "logits")
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    hidden: _tensor_pb2.Tensor
    num_candidates: int
    temperatures: _containers.RepeatedScalarFieldContainer[float]
    logits: bool
    def __init__(self, hidden: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., num_candidates: _Optional[int] = ..., temperatures: _Optional[_Iterable[float]] = ..., logits: _Optional[bool] = ...) -> None: ...

class HeadResult(_message.Message):
    __slots__ = ("candidates", "logits", "logsumexp")
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LOGSUMEXP_FIELD_NUMBER: _ClassVar[int]
    candidates: _tensor_pb2.Tensor
    logits: _tensor_pb2.Tensor
    logsumexp: _tensor_pb2.Tensor
    def __init__(self, candidates: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., logits: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., logsumexp: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("held", "kv_bytes")
    HELD_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    held: Held
    kv_bytes: int
    def __init__(self, held: _Optional[_Union[Held, _Mapping]] = ..., kv_bytes: _Optional[int] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("code", "reason", "message", "held", "sequence", "position")
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    code: int
    reason: str
    message: str
    held: Held
    sequence: int
    position: int
    def __init__(self, code: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., held: _Optional[_Union[Held, _Mapping]] = ..., sequence: _Optional[int] = ..., position: _Optional[int] = ...) -> None: ...

class ExecuteResponse(_message.Message):
    __slots__ = ("step", "round", "epoch", "shard", "compute_ns", "queue_ns", "opened", "partial", "squares", "head", "fault")
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_NS_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    SQUARES_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    step: int
    round: int
    epoch: int
    shard: int
    compute_ns: int
    queue_ns: int
    opened: Opened
    partial: _tensor_pb2.Tensor
    squares: _tensor_pb2.Tensor
    head: HeadResult
    fault: Fault
    def __init__(self, step: _Optional[int] = ..., round: _Optional[int] = ..., epoch: _Optional[int] = ..., shard: _Optional[int] = ..., compute_ns: _Optional[int] = ..., queue_ns: _Optional[int] = ..., opened: _Optional[_Union[Opened, _Mapping]] = ..., partial: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., squares: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., head: _Optional[_Union[HeadResult, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ...) -> None: ...
