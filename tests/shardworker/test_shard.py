"""The sum of all shards' partials is the layer, whatever the cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from protos import plan_pb2, shardworker_pb2, tensor_pb2
from protos.digest import mesh_digest
from protos.tensors import encode
from shardworker import shard
from shardworker.session import Session
from shardworker.shard import Routing, best

F32 = tensor_pb2.DTYPE_F32


def sequence_rows(position: int, rows: int, page_tokens: int, pages: list[int]) -> Any:
    held = -(-position // page_tokens)
    wanted = -(-(position + rows) // page_tokens)
    return shardworker_pb2.SequenceRows(sequence=1, position=position, num_rows=rows, pages=pages[held:wanted], prompt_tokens=1)


def run(
    tiny: Any, make_rounds: Any, tensor_of: Any, *, num_shards: int, chunks: list[int], pages: list[int]
) -> list[torch.Tensor]:
    """Attention outputs of both layers for random hidden rows, in the given chunks, summed over shards."""
    sessions = [Session(tiny.shard(tiny.plan(s, num_shards)), len(pages), 0) for s in range(num_shards)]
    rounds = make_rounds(mesh_digest([]))
    x = torch.randn(2, sum(chunks), tiny.hidden, generator=torch.Generator().manual_seed(1))
    full = tiny.qk_norm == plan_pb2.QK_NORM_FULL
    outputs: list[list[torch.Tensor]] = [[], []]
    position = 0
    for step, rows in enumerate(chunks, 1):
        for layer in range(2):
            hidden = encode(x[layer, position : position + rows], F32)
            extra = {}
            if layer == 0:
                extra["batch"] = shardworker_pb2.Batch(sequences=[sequence_rows(position, rows, tiny.page_tokens, pages)])
            action = shardworker_pb2.Attend(layer=layer, hidden=hidden)
            if full:
                request = rounds.request(step, project=shardworker_pb2.Project(layer=layer, hidden=hidden), **extra)
                squares = torch.stack([tensor_of(s.execute(request).squares) for s in sessions]).sum(0)
                action = shardworker_pb2.Attend(layer=layer, squares=encode(squares, F32))
                extra = {}
            request = rounds.request(step, attend=action, **extra)
            outputs[layer].append(torch.stack([tensor_of(s.execute(request).partial) for s in sessions]).sum(0))
        position += rows
    for layer in range(2):
        torch.testing.assert_close(torch.cat(outputs[layer]), tiny.attend(layer, x[layer]), rtol=1e-4, atol=1e-5)
    return [torch.cat(rows) for rows in outputs]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("norm", [plan_pb2.QK_NORM_NONE, plan_pb2.QK_NORM_HEAD, plan_pb2.QK_NORM_FULL])
def test_attention_partials_sum_to_the_whole(
    make_tiny: Any, make_rounds: Any, tensor_of: Any, num_shards: int, norm: int
) -> None:
    run(make_tiny(qk_norm=norm), make_rounds, tensor_of, num_shards=num_shards, chunks=[5, 1, 3, 1, 1], pages=list(range(8)))


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_attention_with_scattered_pages_equals_the_whole(
    make_tiny: Any, make_rounds: Any, tensor_of: Any, num_shards: int
) -> None:
    run(
        make_tiny(heads=9, rotary=16),
        make_rounds,
        tensor_of,
        num_shards=num_shards,
        chunks=[6, 1, 4, 1],
        pages=[7, 2, 5, 0, 1, 3, 4, 6],
    )


@pytest.mark.parametrize(
    "options", [{"clip": 0.3}, {"clip": 0.3, "qk_norm": plan_pb2.QK_NORM_FULL}, {"rotary": 0}, {"bias": False}]
)
def test_attention_options_equal_the_whole(make_tiny: Any, make_rounds: Any, tensor_of: Any, options: dict[str, Any]) -> None:
    run(make_tiny(**options), make_rounds, tensor_of, num_shards=2, chunks=[4, 1], pages=[0, 1])


def test_sequences_of_one_batch_do_not_see_each_other(tiny: Any, make_rounds: Any, make_batch: Any, tensor_of: Any) -> None:
    session, rounds = Session(tiny.shard(tiny.plan()), 8, 0), make_rounds(b"")
    x = torch.randn(9, tiny.hidden)
    request = rounds.attend(1, 0, x[:7], make_batch((1, 0, 3, [0]), (2, 0, 4, [1])))
    first = tensor_of(session.execute(request).partial)
    torch.testing.assert_close(first[:3], tiny.attend(0, x[:3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first[3:], tiny.attend(0, x[3:7]), rtol=1e-4, atol=1e-5)
    session.execute(rounds.attend(1, 1, x[:7]))
    # A decode row of one with a prefill chunk of the other.
    rows = tensor_of(session.execute(rounds.attend(2, 0, x[6:9], make_batch((2, 4, 1, [5]), (1, 3, 2, [3])))).partial)
    torch.testing.assert_close(rows[:1], tiny.attend(0, torch.cat((x[3:7], x[6:7])))[4:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[1:], tiny.attend(0, torch.cat((x[:3], x[7:9])))[3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [1, 7])
def test_feed_forward_partials_sum_to_the_whole(
    make_tiny: Any, tensor_of: Any, num_shards: int, *, fused: bool, rows: int
) -> None:
    tiny = make_tiny(fused=fused)
    x = torch.randn(rows, tiny.hidden)
    chosen = torch.stack([torch.randperm(tiny.experts)[:2] for _ in range(rows)]).int()
    weights = torch.rand(rows, 2)
    sums = [torch.zeros(rows, tiny.hidden), torch.zeros(rows, tiny.hidden)]
    for number in range(num_shards):
        session = Session(tiny.shard(tiny.plan(number, num_shards)), 1, 0)
        for layer in range(2):
            action = shardworker_pb2.FeedForward(layer=layer, hidden=encode(x, F32))
            if layer == 1:
                action.experts.CopyFrom(encode(chosen, tensor_pb2.DTYPE_I32))
                action.expert_weights.CopyFrom(encode(weights, F32))
            sums[layer] += tensor_of(session.execute(shardworker_pb2.ExecuteRequest(feed_forward=action)).partial)
    for layer in range(2):
        torch.testing.assert_close(sums[layer], tiny.feed_forward(layer, x, chosen, weights), rtol=1e-4, atol=1e-5)


def wide_sums(logits: torch.Tensor, temperatures: list[float]) -> torch.Tensor:
    """What `HeadResult.logsumexp` is of these logits."""
    wide = logits.double()
    scaled = wide / torch.tensor(temperatures, dtype=torch.float64)[:, None]
    return torch.stack((wide.logsumexp(-1), scaled.logsumexp(-1)), 1)


def test_head_finds_the_best_of_all_shards(tiny: Any, tensor_of: Any) -> None:
    x = torch.randn(3, tiny.hidden)
    logits = x @ tiny.tensors["head"].T
    temperatures = [0.5, 1.0, 2.0]
    ids, values, sums = [], [], []
    for number in range(3):
        action = shardworker_pb2.Head(hidden=encode(x, F32), num_candidates=5, temperatures=temperatures)
        session = Session(tiny.shard(tiny.plan(number, 3)), 1, 0)
        head = session.execute(shardworker_pb2.ExecuteRequest(head=action)).head
        ids.append(tensor_of(head.candidates).long())
        values.append(tensor_of(head.logits))
        sums.append(tensor_of(head.logsumexp))
        action = shardworker_pb2.Head(hidden=encode(x, F32), logits=True)
        part = tensor_of(session.execute(shardworker_pb2.ExecuteRequest(head=action)).head.logits)
        start, end = tiny.vocabulary * number // 3, tiny.vocabulary * (number + 1) // 3
        torch.testing.assert_close(part, logits[:, start:end])
    top = torch.cat(values, 1).topk(5, -1)
    assert torch.equal(torch.cat(ids, 1).gather(1, top.indices), logits.topk(5, -1).indices)
    torch.testing.assert_close(torch.stack(sums).logsumexp(0), wide_sums(logits, temperatures), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperatures", [[1.0, 1.0, 1.0], [0.7, 1.0, 1e-5]])
def test_logsumexp_is_that_of_the_logits_in_float64(tiny: Any, tensor_of: Any, temperatures: list[float]) -> None:
    session = Session(tiny.shard(tiny.plan()), 1, 0)
    hidden = encode(torch.randn(3, tiny.hidden), F32)
    few = shardworker_pb2.Head(hidden=hidden, num_candidates=1, temperatures=temperatures)
    head = session.execute(shardworker_pb2.ExecuteRequest(head=few)).head
    whole = session.execute(shardworker_pb2.ExecuteRequest(head=shardworker_pb2.Head(hidden=hidden, logits=True))).head
    assert head.logsumexp.dtype == tensor_pb2.DTYPE_F64
    wanted = wide_sums(tensor_of(whole.logits), temperatures)
    torch.testing.assert_close(tensor_of(head.logsumexp), wanted, rtol=1e-15, atol=0)


@pytest.mark.parametrize("pass_bytes", [1, 3000, 12000])
def test_many_rows_in_several_passes_give_what_one_pass_gives(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, pass_bytes: int
) -> None:
    one = tiny.shard(tiny.plan())
    x = torch.randn(7, tiny.hidden)
    chosen = torch.stack([torch.randperm(tiny.experts)[:2] for _ in range(7)]).int()
    routing = Routing(chosen, torch.rand(7, 2), torch.rand(7))
    temperatures = torch.rand(7, dtype=torch.float64) + 0.5
    whole = [one.feed_forward(0, x, None), one.feed_forward(1, x, routing), *one.candidates(x, 3, temperatures)]
    monkeypatch.setattr(shard, "PASS_BYTES", pass_bytes)
    for found, wanted in zip(
        [one.feed_forward(0, x, None), one.feed_forward(1, x, routing), *one.candidates(x, 3, temperatures)], whole, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_best_prefers_lower_ids_among_equals() -> None:
    logits = torch.tensor([[1.0, 3, 2, 3, 2, 2, 3], [0, 0, 0, 0, 0, 0, 0]])
    assert best(logits, 1).tolist() == [[1], [0]]
    assert best(logits, 5).tolist() == [[1, 3, 6, 2, 4], [0, 1, 2, 3, 4]]
    assert best(logits[:, :0], 0).shape == (2, 0)


def test_best_equals_a_stable_sort_on_coarse_logits() -> None:
    logits = torch.randint(0, 5, (20, 300), generator=torch.Generator().manual_seed(3)).float()
    wanted = logits.sort(stable=True, dim=-1, descending=True).indices
    for count in (2, 17, 299, 300):
        assert torch.equal(best(logits, count), wanted[:, :count])


@pytest.mark.parametrize("wire", [tensor_pb2.DTYPE_BF16, tensor_pb2.DTYPE_F16, tensor_pb2.DTYPE_INT8_BLOCK32])
def test_partial_comes_in_the_dtype_of_hidden(tiny: Any, tensor_of: Any, wire: int) -> None:
    x = torch.randn(2, tiny.hidden)
    action = shardworker_pb2.FeedForward(layer=0, hidden=encode(x, wire))
    partial = Session(tiny.shard(tiny.plan()), 1, 0).execute(shardworker_pb2.ExecuteRequest(feed_forward=action)).partial
    assert partial.dtype == wire
    torch.testing.assert_close(tensor_of(partial).float(), tiny.feed_forward(0, x, None, None), rtol=0.1, atol=0.1)
