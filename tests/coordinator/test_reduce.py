"""The sum of partials: order, bits, and who is to blame."""

import pytest
import torch

from coordinator.reduce import PartialSum
from protos.errors import WrongResult
from protos.tensor_pb2 import DTYPE_BF16, DTYPE_F32, DTYPE_F64, DTYPE_I32, DTYPE_INT8_BLOCK32, DType, Tensor
from protos.tensors import decode, encode


def reduce_partials(messages: list[Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    total = PartialSum(shape)
    for message in messages:
        total.add(message)
    return total.total()


def test_partials_are_summed_in_shard_order() -> None:
    # In float32, (1e8 + 1) - 1e8 is 0 and (1e8 - 1e8) + 1 is 1: the order shows.
    one, big = torch.ones(1, 2), torch.full((1, 2), 1e8)
    messages = [encode(partial, DTYPE_F32) for partial in (big, one, -big)]
    assert reduce_partials(messages, (1, 2)).tolist() == [[0.0, 0.0]]
    assert reduce_partials([messages[0], messages[2], messages[1]], (1, 2)).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("dtype", [DTYPE_F32, DTYPE_BF16, DTYPE_INT8_BLOCK32])
def test_sum_has_the_bits_of_a_float32_sum(dtype: DType) -> None:
    generator = torch.Generator().manual_seed(0)
    partials = [torch.randn(3, 40, generator=generator) for _ in range(5)]
    messages = [encode(partial, dtype) for partial in partials]
    wanted = torch.zeros(3, 40)
    for message in messages:
        wanted = wanted + decode(message).float()
    found = reduce_partials(messages, (3, 40))
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert torch.equal(found, reduce_partials(messages, (3, 40)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_partial_that_is_not_finite_names_its_shards(bad: float) -> None:
    good, wrong = torch.ones(2, 3), torch.ones(2, 3)
    wrong[1, 2] = bad
    messages = [encode(one, DTYPE_F32) for one in (good, wrong, good, wrong)]
    with pytest.raises(WrongResult, match=r"partials of shards \[1, 3\] sum to NaN or infinity"):
        reduce_partials(messages, (2, 3))


def test_finite_partials_whose_sum_overflows_blame_all() -> None:
    messages = [encode(torch.full((1, 1), 3e38), DTYPE_F32)] * 2
    with pytest.raises(WrongResult, match="shards all sum to"):
        reduce_partials(messages, (1, 1))


def test_partial_of_another_shape_names_its_shard() -> None:
    messages = [encode(torch.ones(2, 3), DTYPE_F32), encode(torch.ones(3, 2), DTYPE_F32)]
    with pytest.raises(WrongResult, match=r"shard 1 answered a partial of shape \[3, 2\], wanted \[2, 3\]"):
        reduce_partials(messages, (2, 3))


@pytest.mark.parametrize("dtype", [DTYPE_I32, DTYPE_F64])
def test_partial_of_a_dtype_that_no_partial_has_is_a_wrong_result(dtype: DType) -> None:
    messages = [encode(torch.ones(2, 3), DTYPE_F32), encode(torch.ones(2, 3), dtype)]
    with pytest.raises(WrongResult, match=f"shard 1 answered a partial of dtype {dtype}"):
        reduce_partials(messages, (2, 3))


@pytest.mark.parametrize("data", [b"", b"123"])
def test_partial_without_its_bytes_is_a_wrong_result_not_the_callers_mistake(data: bytes) -> None:
    with pytest.raises(WrongResult, match="shard 0 answered a partial that is none"):
        reduce_partials([Tensor(dtype=DTYPE_F32, shape=[1, 3], data=data)], (1, 3))
