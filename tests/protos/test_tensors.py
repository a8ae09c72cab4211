"""The tensor codec: exact round trips, the error of int8 blocks, and messages that lie."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import tensor_pb2
from protos.errors import InvalidArgument
from protos.shardworker_pb2 import ExecuteRequest
from protos.tensors import BLOCK, TORCH_DTYPES, all_finite, decode, encode, encode_into, num_bytes

INT8 = tensor_pb2.DTYPE_INT8_BLOCK32
ALL_DTYPES = [dtype for dtype in tensor_pb2.DType.values() if dtype != tensor_pb2.DTYPE_UNSPECIFIED]
SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=4)


def random_tensor(shape: list[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int32:
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator, dtype=dtype)
    return (torch.randn(shape, generator=generator) * 100).to(dtype)


@given(dtype=st.sampled_from(sorted(TORCH_DTYPES)), shape=SHAPES, seed=st.integers(0, 2**32))
def test_round_trip_is_exact_for_every_dtype_and_shape(dtype: tensor_pb2.DType, shape: list[int], seed: int) -> None:
    tensor = random_tensor(shape, TORCH_DTYPES[dtype], seed)
    message = encode(tensor, dtype)
    result = decode(tensor_pb2.Tensor.FromString(message.SerializeToString()))
    assert len(message.data) == num_bytes(dtype, shape)
    assert result.dtype == tensor.dtype
    assert result.shape == tensor.shape
    assert torch.equal(result, tensor)


@given(shape=SHAPES)
def test_every_dtype_has_a_codec_of_the_stated_length(shape: list[int]) -> None:
    for dtype in ALL_DTYPES:
        message = encode(torch.zeros(shape), dtype)
        assert len(message.data) == num_bytes(dtype, shape)
        assert list(decode(message).shape) == shape


def test_special_values_survive() -> None:
    tensor = torch.tensor([math.inf, -math.inf, 0.0, -0.0, 2.0**-149, 3.4e38])
    assert encode(tensor, tensor_pb2.DTYPE_F32).data == tensor.numpy().tobytes()
    assert decode(encode(torch.tensor([math.nan]), tensor_pb2.DTYPE_BF16)).isnan().all()


def test_bytes_are_row_major_and_little_endian() -> None:
    message = encode(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), tensor_pb2.DTYPE_I32)
    assert message.data == b"".join(value.to_bytes(4, "little") for value in (1, 2, 3, 4))
    assert encode(torch.tensor([1.0]), tensor_pb2.DTYPE_BF16).data == b"\x80\x3f"


def test_strided_tensors_are_sent_as_they_read() -> None:
    tensor = torch.arange(24.0).view(4, 6).t()[1:5:2]
    assert torch.equal(decode(encode(tensor, tensor_pb2.DTYPE_F32)), tensor)
    assert torch.equal(
        decode(encode(torch.arange(64.0).view(2, 32).t().contiguous().t(), INT8)).round(), torch.arange(64.0).view(2, 32)
    )


def test_gradients_do_not_hinder() -> None:
    tensor = torch.ones(3, requires_grad=True)
    assert not decode(encode(tensor, tensor_pb2.DTYPE_F32)).requires_grad


MAGNITUDES = st.floats(2.0**-100, 2.0**100, width=32)
ELEMENTS = st.one_of(st.just(0.0), MAGNITUDES, MAGNITUDES.map(lambda value: -value))


@given(rows=st.integers(1, 3), columns=st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 97]), data=st.data())
def test_int8_blocks_err_by_half_a_step_of_their_block(rows: int, columns: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(ELEMENTS, min_size=rows * columns, max_size=rows * columns))
    tensor = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    message = encode(tensor, INT8)
    result = decode(message)
    assert len(message.data) == rows * math.ceil(columns / BLOCK) * (BLOCK + 2)
    assert result.shape == tensor.shape
    for start in range(0, columns, BLOCK):
        block = tensor[:, start : start + BLOCK]
        # The scale is rounded to bfloat16, which has 8 significant bits.
        step = block.abs().amax(dim=1, keepdim=True) / 127 * (1 + 2**-8)
        assert ((result[:, start : start + BLOCK] - block).abs() <= step * 0.501).all()


def test_int8_blocks_of_one_row_do_not_disturb_each_other() -> None:
    tensor = torch.cat([torch.full((1, 32), 1e-6), torch.full((1, 32), 1e6)], dim=1)
    assert torch.allclose(decode(encode(tensor, INT8)), tensor, rtol=5e-3)


def test_int8_shows_what_is_not_finite() -> None:
    for bad in (math.nan, math.inf):
        assert not decode(encode(torch.tensor([[1.0, bad]]), INT8)).isfinite().all()


def test_int8_blocks_of_the_smallest_numbers_are_zero_and_never_wrap() -> None:
    for smallest in (2.0**-149, 2.0**-140, 2.0**-133, 2.0**-127):
        tensor = torch.full((1, 32), smallest)
        assert (decode(encode(tensor, INT8)) - tensor).abs().max() <= smallest
    largest = torch.full((1, 32), 3.4e38)
    assert torch.allclose(decode(encode(largest, INT8)), largest, rtol=5e-3)


def test_encoding_into_a_field_is_encoding() -> None:
    for dtype in ALL_DTYPES:
        tensor = torch.arange(66).view(2, 33)
        message = ExecuteRequest()
        encode_into(message.attend.hidden, tensor, dtype)
        assert message.attend.hidden == encode(tensor, dtype)
        assert message.WhichOneof("action") == "attend"


def test_all_finite_is_not_misled_by_sums() -> None:
    assert all_finite(torch.full((4,), 3e38))
    assert all_finite(torch.zeros(0))
    for bad in (math.nan, math.inf, -math.inf):
        assert not all_finite(torch.tensor([1.0, bad, 3.0]))
    assert not all_finite(torch.tensor([math.inf, -math.inf]))


HOSTILE = {
    "no dimensions": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_F32, data=b"1234"),
    "five dimensions": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_F32, shape=[1] * 5, data=b"1234"),
    "millions of dimensions": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_F32, shape=[2**31] * 2_000_000),
    "huge dimensions": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_F32, shape=[2**31 - 1] * 4, data=b"1234"),
    "huge int8 dimensions": tensor_pb2.Tensor(dtype=INT8, shape=[2**31 - 1] * 4, data=b"1234"),
    "a dimension of 32 bits": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_F32, shape=[2**31, 0]),
    "nothing of huge strides": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_F32, shape=[0, *[2**31 - 1] * 3]),
    "data too short": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_F32, shape=[2], data=b"1234567"),
    "data too long": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_F32, shape=[2], data=b"123456789"),
    "data where there is none": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_F32, shape=[0], data=b"1"),
    "data missing": tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_F32, shape=[2]),
    "int8 without scales": tensor_pb2.Tensor(dtype=INT8, shape=[1, 32], data=bytes(32)),
    "int8 without padding": tensor_pb2.Tensor(dtype=INT8, shape=[1, 33], data=bytes(33 + 4)),
    "no dtype": tensor_pb2.Tensor(shape=[1], data=b"1234"),
    "unknown dtype": tensor_pb2.Tensor(dtype=77, shape=[1], data=b"1234"),
    "unknown dtype of nothing": tensor_pb2.Tensor(dtype=77, shape=[0]),
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_message_that_lies_is_refused(message: tensor_pb2.Tensor) -> None:
    with pytest.raises(InvalidArgument, match=r"^(a tensor|tensor dtype)") as raised:
        decode(message)
    assert len(str(raised.value)) < 200


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_tensor_or_refused(data: bytes) -> None:
    message = tensor_pb2.Tensor(dtype=INT8, shape=[1, 40], data=data)
    if len(data) == 2 * (BLOCK + 2):
        assert decode(message).shape == (1, 40)
    else:
        with pytest.raises(InvalidArgument):
            decode(message)
