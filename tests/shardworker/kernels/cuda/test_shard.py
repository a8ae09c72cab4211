"""A whole worker's rounds with these kernels: loading, a prompt, decoding with recorded launches, uneven shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from protos import plan_pb2, shardworker_pb2, tensor_pb2
from protos.digest import mesh_digest
from protos.tensors import encode
from shardworker.kernels.cuda.graphs import Recording
from shardworker.kernels.cuda.kernels import CudaKernels
from shardworker.loader import load_weights
from shardworker.session import Session
from shardworker.shard import Routing, Shard

if TYPE_CHECKING:
    from collections.abc import Callable

F32 = tensor_pb2.DTYPE_F32


class Again:
    """Replays by calling again."""

    def record(self, compute: Callable[[], torch.Tensor]) -> Recording:
        output = torch.empty_like(compute())

        def replay() -> None:
            output.copy_(compute())

        return Recording(replay, output)


def load(tiny: Any, plan: plan_pb2.ShardPlan, kernels: CudaKernels) -> Shard:
    weights, num_bytes = load_weights(plan, str(tiny.directory), kernels, lambda _: None, lambda: False)
    return Shard(plan, weights, num_bytes, kernels)


@pytest.mark.parametrize(
    ("num_shards", "norm"), [(1, plan_pb2.QK_NORM_FULL), (2, plan_pb2.QK_NORM_HEAD), (8, plan_pb2.QK_NORM_HEAD)]
)
def test_attention_partials_sum_to_the_whole(  # noqa: PLR0917
    kernels: CudaKernels, make_tiny: Any, make_rounds: Any, tensor_of: Any, num_shards: int, norm: int
) -> None:
    tiny = make_tiny(qk_norm=norm, heads=6)
    recorder = Again() if kernels.device.type == "cpu" else None
    sessions = [
        Session(load(tiny, tiny.plan(shard, num_shards), CudaKernels(kernels.device, recorder)), 4, 0)
        for shard in range(num_shards)
    ]
    rounds = make_rounds(mesh_digest([]))
    x = torch.randn(2, 7, tiny.hidden)
    found: list[list[torch.Tensor]] = [[], []]
    for step, (position, count) in enumerate([(0, 5), (5, 1), (6, 1)], 1):
        for layer in range(2):
            hidden = encode(x[layer, position : position + count], F32)
            new_pages = {0: [3, 1], 5: [], 6: []}[position]
            rows = shardworker_pb2.SequenceRows(sequence=1, position=position, num_rows=count, pages=new_pages, prompt_tokens=5)
            extra: dict[str, Any] = {"batch": shardworker_pb2.Batch(sequences=[rows])} if layer == 0 else {}
            action = shardworker_pb2.Attend(layer=layer, hidden=hidden)
            if norm == plan_pb2.QK_NORM_FULL:
                request = rounds.request(step, project=shardworker_pb2.Project(layer=layer, hidden=hidden), **extra)
                squares = torch.stack([tensor_of(session.execute(request).squares) for session in sessions]).sum(0)
                action, extra = shardworker_pb2.Attend(layer=layer, squares=encode(squares, F32)), {}
            request = rounds.request(step, attend=action, **extra)
            found[layer].append(torch.stack([tensor_of(session.execute(request).partial) for session in sessions]).sum(0))
    for layer in range(2):
        torch.testing.assert_close(torch.cat(found[layer]), tiny.attend(layer, x[layer]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_feed_forward_partials_sum_to_the_whole(kernels: CudaKernels, make_tiny: Any, num_shards: int) -> None:
    tiny = make_tiny()
    # Two units of 32 columns over three shards: one has none.
    shards = [load(tiny, tiny.plan(shard, num_shards), kernels) for shard in range(num_shards)]
    x = torch.randn(3, tiny.hidden)
    chosen = torch.stack([torch.randperm(tiny.experts)[:2] for _ in range(3)]).int()
    routing = Routing(chosen, torch.rand(3, 2), None)
    for layer in range(2):
        wanted = tiny.feed_forward(layer, x, routing.chosen, routing.weights)
        parts = [s.feed_forward(layer, x.to(kernels.device), routing if layer else None).float().cpu() for s in shards]
        torch.testing.assert_close(torch.stack(parts).sum(0), wanted, rtol=1e-4, atol=1e-5)


def test_random_int4_weights_fill_all_of_the_memory(kernels: CudaKernels, make_tiny: Any) -> None:
    tiny = make_tiny()
    plan = tiny.plan(random_weights=True, quantization=plan_pb2.QUANTIZATION_INT4)
    shard = load(tiny, plan, kernels)
    logits = shard.logits(torch.randn(2, tiny.hidden, device=kernels.device))
    assert logits.shape == (2, tiny.vocabulary)
    assert bool(logits.isfinite().all())
