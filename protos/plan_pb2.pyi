from protos import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Quantization(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QUANTIZATION_UNSPECIFIED: _ClassVar[Quantization]
    QUANTIZATION_NONE: _ClassVar[Quantization]
    QUANTIZATION_INT8: _ClassVar[Quantization]
    QUANTIZATION_INT4: _ClassVar[Quantization]

class QkNorm(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    QK_NORM_UNSPECIFIED: _ClassVar[QkNorm]
    QK_NORM_NONE: _ClassVar[QkNorm]
    QK_NORM_HEAD: _ClassVar[QkNorm]
    QK_NORM_FULL: _ClassVar[QkNorm]
QUANTIZATION_UNSPECIFIED: Quantization
QUANTIZATION_NONE: Quantization
QUANTIZATION_INT8: Quantization
QUANTIZATION_INT4: Quantization
QK_NORM_UNSPECIFIED: QkNorm
QK_NORM_NONE: QkNorm
QK_NORM_HEAD: QkNorm
QK_NORM_FULL: QkNorm

class Range(_message.Message):
    __slots__ = ("start", "end")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class TensorSlice(_message.Message):
    __slots__ = ("name", "shape", "ranges", "num_experts")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    ranges: _containers.RepeatedCompositeFieldContainer[Range]
    num_experts: int
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., ranges: _Optional[_Iterable[_Union[Range, _Mapping]]] = ..., num_experts: _Optional[int] = ...) -> None: ...

class RopeSpec(_message.Message):
    __slots__ = ("rotary_dims", "inverse_frequencies", "attention_factor", "dynamic")
    ROTARY_DIMS_FIELD_NUMBER: _ClassVar[int]
    INVERSE_FREQUENCIES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FACTOR_FIELD_NUMBER: _ClassVar[int]
    DYNAMIC_FIELD_NUMBER: _ClassVar[int]
    rotary_dims: int
    inverse_frequencies: _containers.RepeatedScalarFieldContainer[float]
    attention_factor: float
    dynamic: DynamicNtk
    def __init__(self, rotary_dims: _Optional[int] = ..., inverse_frequencies: _Optional[_Iterable[float]] = ..., attention_factor: _Optional[float] = ..., dynamic: _Optional[_Union[DynamicNtk, _Mapping]] = ...) -> None: ...

class DynamicNtk(_message.Message):
    __slots__ = ("base", "factor", "original_positions")
    BASE_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    ORIGINAL_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    base: float
    factor: float
    original_positions: int
    def __init__(self, base: _Optional[float] = ..., factor: _Optional[float] = ..., original_positions: _Optional[int] = ...) -> None: ...

class AttentionSpec(_message.Message):
    __slots__ = ("num_heads", "num_kv_heads", "head_dim", "scale", "qk_norm", "qk_norm_eps", "clip_qkv", "rope")
    NUM_HEADS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    QK_NORM_FIELD_NUMBER: _ClassVar[int]
    QK_NORM_EPS_FIELD_NUMBER: _ClassVar[int]
    CLIP_QKV_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qk_norm: QkNorm
    qk_norm_eps: float
    clip_qkv: float
    rope: RopeSpec
    def __init__(self, num_heads: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., scale: _Optional[float] = ..., qk_norm: _Optional[_Union[QkNorm, str]] = ..., qk_norm_eps: _Optional[float] = ..., clip_qkv: _Optional[float] = ..., rope: _Optional[_Union[RopeSpec, _Mapping]] = ...) -> None: ...

class AttentionSlice(_message.Message):
    __slots__ = ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias", "q_norm", "k_norm")
    Q_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    O_FIELD_NUMBER: _ClassVar[int]
    Q_BIAS_FIELD_NUMBER: _ClassVar[int]
    K_BIAS_FIELD_NUMBER: _ClassVar[int]
    V_BIAS_FIELD_NUMBER: _ClassVar[int]
    O_BIAS_FIELD_NUMBER: _ClassVar[int]
    Q_NORM_FIELD_NUMBER: _ClassVar[int]
    K_NORM_FIELD_NUMBER: _ClassVar[int]
    q: TensorSlice
    k: TensorSlice
    v: TensorSlice
    o: TensorSlice
    q_bias: TensorSlice
    k_bias: TensorSlice
    v_bias: TensorSlice
    o_bias: TensorSlice
    q_norm: TensorSlice
    k_norm: TensorSlice
    def __init__(self, q: _Optional[_Union[TensorSlice, _Mapping]] = ..., k: _Optional[_Union[TensorSlice, _Mapping]] = ..., v: _Optional[_Union[TensorSlice, _Mapping]] = ..., o: _Optional[_Union[TensorSlice, _Mapping]] = ..., q_bias: _Optional[_Union[TensorSlice, _Mapping]] = ..., k_bias: _Optional[_Union[TensorSlice, _Mapping]] = ..., v_bias: _Optional[_Union[TensorSlice, _Mapping]] = ..., o_bias: _Optional[_Union[TensorSlice, _Mapping]] = ..., q_norm: _Optional[_Union[TensorSlice, _Mapping]] = ..., k_norm: _Optional[_Union[TensorSlice, _Mapping]] = ...) -> None: ...

class FeedForwardSlice(_message.Message):
    __slots__ = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    GATE_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    DOWN_FIELD_NUMBER: _ClassVar[int]
    GATE_BIAS_FIELD_NUMBER: _ClassVar[int]
    UP_BIAS_FIELD_NUMBER: _ClassVar[int]
    DOWN_BIAS_FIELD_NUMBER: _ClassVar[int]
    gate: TensorSlice
    up: TensorSlice
    down: TensorSlice
    gate_bias: TensorSlice
    up_bias: TensorSlice
    down_bias: TensorSlice
    def __init__(self, gate: _Optional[_Union[TensorSlice, _Mapping]] = ..., up: _Optional[_Union[TensorSlice, _Mapping]] = ..., down: _Optional[_Union[TensorSlice, _Mapping]] = ..., gate_bias: _Optional[_Union[TensorSlice, _Mapping]] = ..., up_bias: _Optional[_Union[TensorSlice, _Mapping]] = ..., down_bias: _Optional[_Union[TensorSlice, _Mapping]] = ...) -> None: ...

class ExpertsSlice(_message.Message):
    __slots__ = ("num_experts", "gate", "up", "down", "shared")
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    UP_FIELD_NUMBER: _ClassVar[int]
    DOWN_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    num_experts: int
    gate: TensorSlice
    up: TensorSlice
    down: TensorSlice
    shared: FeedForwardSlice
    def __init__(self, num_experts: _Optional[int] = ..., gate: _Optional[_Union[TensorSlice, _Mapping]] = ..., up: _Optional[_Union[TensorSlice, _Mapping]] = ..., down: _Optional[_Union[TensorSlice, _Mapping]] = ..., shared: _Optional[_Union[FeedForwardSlice, _Mapping]] = ...) -> None: ...

class LayerPlan(_message.Message):
    __slots__ = ("attention", "dense", "experts")
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    attention: AttentionSlice
    dense: FeedForwardSlice
    experts: ExpertsSlice
    def __init__(self, attention: _Optional[_Union[AttentionSlice, _Mapping]] = ..., dense: _Optional[_Union[FeedForwardSlice, _Mapping]] = ..., experts: _Optional[_Union[ExpertsSlice, _Mapping]] = ...) -> None: ...

class CheckpointFile(_message.Message):
    __slots__ = ("name", "size", "fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    size: int
    fingerprint: bytes
    def __init__(self, name: _Optional[str] = ..., size: _Optional[int] = ..., fingerprint: _Optional[bytes] = ...) -> None: ...

class ShardPlan(_message.Message):
    __slots__ = ("shard", "num_shards", "dtype", "quantization", "hidden", "attention", "heads", "kv_heads", "layers", "head", "vocabulary", "files", "page_tokens", "random_weights", "head_quantization")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RANDOM_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    HEAD_QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    shard: int
    num_shards: int
    dtype: _tensor_pb2.DType
    quantization: Quantization
    hidden: int
    attention: AttentionSpec
    heads: Range
    kv_heads: Range
    layers: _containers.RepeatedCompositeFieldContainer[LayerPlan]
    head: TensorSlice
    vocabulary: Range
    files: _containers.RepeatedCompositeFieldContainer[CheckpointFile]
    page_tokens: int
    random_weights: bool
    head_quantization: Quantization
    def __init__(self, shard: _Optional[int] = ..., num_shards: _Optional[int] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., quantization: _Optional[_Union[Quantization, str]] = ..., hidden: _Optional[int] = ..., attention: _Optional[_Union[AttentionSpec, _Mapping]] = ..., heads: _Optional[_Union[Range, _Mapping]] = ..., kv_heads: _Optional[_Union[Range, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerPlan, _Mapping]]] = ..., head: _Optional[_Union[TensorSlice, _Mapping]] = ..., vocabulary: _Optional[_Union[Range, _Mapping]] = ..., files: _Optional[_Iterable[_Union[CheckpointFile, _Mapping]]] = ..., page_tokens: _Optional[int] = ..., random_weights: _Optional[bool] = ..., head_quantization: _Optional[_Union[Quantization, str]] = ...) -> None: ...
