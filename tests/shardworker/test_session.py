"""The order of rounds and what each may bring; arithmetic is in test_shard.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from protos import plan_pb2, shardworker_pb2, tensor_pb2
from protos.errors import InvalidArgument, OutOfMemory, PlanMismatch, StepMismatch
from protos.tensors import encode
from shardworker import kv
from shardworker.memory import Memory
from shardworker.session import Session
from shardworker.tables import HeldPosition

F32, F64, I32 = tensor_pb2.DTYPE_F32, tensor_pb2.DTYPE_F64, tensor_pb2.DTYPE_I32
X = torch.ones(1, 64)


@pytest.fixture
def session(tiny: Any) -> Session:
    return Session(tiny.shard(tiny.plan()), 8, 0)


@pytest.fixture
def rounds(make_rounds: Any) -> Any:
    return make_rounds(b"")


def test_rounds_out_of_order_are_refused_and_change_nothing(session: Session, rounds: Any, make_batch: Any) -> None:
    one = make_batch((1, 0, 1, [0]))
    with pytest.raises(StepMismatch, match="step 1 is not open"):
        session.execute(rounds.attend(1, 0, X))
    with pytest.raises(StepMismatch, match="a batch comes with layer 0's attend"):
        session.execute(rounds.attend(1, 1, X, one))
    session.execute(rounds.attend(1, 0, X, one))
    with pytest.raises(StepMismatch, match="wanted layer 1's attend, found layer 0's attend"):
        session.execute(rounds.attend(1, 0, X))
    with pytest.raises(StepMismatch, match="wanted a step above 1, found 1"):
        session.execute(rounds.attend(1, 0, X, one))
    session.execute(rounds.attend(1, 1, X))
    with pytest.raises(StepMismatch, match="step 1 is not open"):
        session.execute(rounds.attend(1, 1, X))
    session.execute(rounds.attend(2, 0, X, make_batch((1, 1, 1, []))))


def test_a_refused_batch_begins_no_step(session: Session, rounds: Any, make_batch: Any) -> None:
    with pytest.raises(HeldPosition):
        session.execute(rounds.attend(5, 0, X, make_batch((1, 3, 1, []))))
    with pytest.raises(InvalidArgument, match=r"hidden: wanted \[1, 64\]"):
        session.execute(rounds.attend(5, 0, torch.ones(2, 64), make_batch((1, 0, 1, [0]))))
    session.execute(rounds.attend(5, 0, X, make_batch((1, 0, 1, [0]))))


def test_a_step_begins_again_until_it_is_committed(session: Session, rounds: Any, make_batch: Any, tensor_of: Any) -> None:
    wanted = tensor_of(session.execute(rounds.attend(1, 0, X, make_batch((1, 0, 1, [0])))).partial)
    again = tensor_of(session.execute(rounds.attend(2, 0, X, make_batch((1, 0, 1, [3])))).partial)
    assert torch.equal(wanted, again)
    with pytest.raises(StepMismatch, match=r"step 1 is not open \(open: \[2\]\)"):
        session.execute(rounds.attend(1, 1, X))
    session.execute(rounds.attend(2, 1, X))


def test_two_steps_may_be_under_way_and_a_third_ends_the_older(session: Session, rounds: Any, make_batch: Any) -> None:
    for step in (1, 2, 3):
        session.execute(rounds.attend(step, 0, X, make_batch((step, 0, 1, [step]))))
    with pytest.raises(StepMismatch, match=r"step 1 is not open \(open: \[2, 3\]\)"):
        session.execute(rounds.attend(1, 1, X))
    session.execute(rounds.attend(3, 1, X))
    session.execute(rounds.attend(2, 1, X))


def test_release_ends_the_step_of_the_sequence(session: Session, rounds: Any, make_batch: Any) -> None:
    session.execute(rounds.attend(1, 0, X, make_batch((1, 0, 1, [0]))))
    session.execute(rounds.attend(2, 0, X, make_batch((2, 0, 1, [0]), released=(1,))))
    with pytest.raises(StepMismatch, match="step 1 is not open"):
        session.execute(rounds.attend(1, 1, X))


def test_a_failure_halfway_ends_the_step(monkeypatch: pytest.MonkeyPatch, session: Session, rounds: Any, make_batch: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(kv.KvPool, "layer", fail)
        with pytest.raises(RuntimeError, match="broken"):
            session.execute(rounds.attend(1, 0, X, make_batch((1, 0, 1, [0]))))
    with pytest.raises(StepMismatch, match="step 1 is not open"):
        session.execute(rounds.attend(1, 1, X))
    session.execute(rounds.attend(2, 0, X, make_batch((1, 0, 1, [0]))))


def attend(**fields: Any) -> Any:
    return {"attend": shardworker_pb2.Attend(layer=0, **fields)}


def feed(layer: int = 1, **fields: Any) -> Any:
    fields.setdefault("hidden", encode(X, F32))
    return {"feed_forward": shardworker_pb2.FeedForward(layer=layer, **fields)}


def routed(ids: list[int], **fields: Any) -> Any:
    weights = encode(torch.ones(1, len(ids)), F32)
    return feed(**{"experts": encode(torch.tensor([ids]).int(), I32), "expert_weights": weights, **fields})


def head(**fields: Any) -> Any:
    fields.setdefault("hidden", encode(X, F32))
    return {"head": shardworker_pb2.Head(**fields)}


def lying(shape: list[int], data: bytes = b"", dtype: int = F32) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, data=data)


BAD = [
    ({}, "found no action"),
    (attend(), "attend brings"),
    (attend(hidden=encode(X, F32), squares=encode(torch.ones(1, 2), F32)), "attend brings"),
    (attend(hidden=encode(torch.ones(1, 63), F32)), r"wanted \[1, 64\]"),
    (attend(hidden=lying([1, 64], bytes(255))), "needs 256 bytes, found 255"),
    (attend(hidden=lying([1, 64], bytes(256), I32)), "found DTYPE_I32"),
    (attend(hidden=lying([1, 64], bytes(512), F64)), "hidden: wanted F32, BF16, F16 or INT8_BLOCK32, found DTYPE_F64"),
    (attend(hidden=lying([1, 64], bytes(256), 99)), "dtype 99 is unknown"),
    (attend(hidden=lying([1] * 1000)), "hidden: wanted"),
    (feed(layer=2), "layer 2 of 2"),
    (feed(hidden=encode(torch.ones(0, 64), F32)), "at least one row"),
    (feed(), "MoE layers"),
    (routed([0], layer=0), "MoE layers"),
    (feed(layer=0, shared_weights=encode(torch.ones(1), F32)), "no shared expert"),
    (routed([4]), "distinct ids below 4"),
    (routed([-1]), "distinct ids below 4"),
    (routed([1, 1]), "distinct ids below 4"),
    (routed([]), "at least one for each row"),
    (routed([1], expert_weights=encode(torch.ones(1, 2), F32)), "expert_weights: wanted"),
    (routed([1], expert_weights=encode(torch.tensor([[float("nan")]]), F32)), "expert_weights: wanted finite"),
    (routed([1], expert_weights=encode(torch.tensor([[float("inf")]]), F32)), "expert_weights: wanted finite"),
    (routed([1], shared_weights=encode(torch.tensor([float("-inf")]), F32)), "shared_weights: wanted finite"),
    (routed([1], experts=encode(torch.ones(1, 1), F32)), "experts: wanted DTYPE_I32"),
    (routed([1], shared_weights=encode(torch.ones(2), F32)), "shared_weights: wanted"),
    (head(num_candidates=0, temperatures=[1]), "num_candidates"),
    (head(num_candidates=1025, temperatures=[1]), "num_candidates"),
    (head(num_candidates=1), "temperatures"),
    (head(num_candidates=1, temperatures=[0]), "temperatures"),
    (head(num_candidates=1, temperatures=[float("nan")]), "temperatures"),
    (head(num_candidates=1, temperatures=[float("inf")]), "temperatures"),
    (head(hidden=encode(torch.ones(0, 64), F32), num_candidates=1), "at least one row"),
]


@pytest.mark.parametrize(("action", "text"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_round_is_refused_and_the_session_lives_on(
    session: Session, rounds: Any, make_batch: Any, action: dict[str, Any], text: str
) -> None:
    extra = {"batch": make_batch((1, 0, 1, [0]))} if "attend" in action else {}
    with pytest.raises(InvalidArgument, match=text):
        session.execute(rounds.request(1, **action, **extra))
    session.execute(rounds.attend(1, 0, X, make_batch((1, 0, 1, [0]))))
    session.execute(rounds.request(1, **routed([3, 0])))


def test_norms_over_all_heads_need_project_first(make_tiny: Any, rounds: Any, make_batch: Any) -> None:
    tiny = make_tiny(qk_norm=plan_pb2.QK_NORM_FULL)
    session = Session(tiny.shard(tiny.plan()), 8, 0)
    one = make_batch((1, 0, 1, [0]))
    with pytest.raises(StepMismatch, match="a batch comes with layer 0's project"):
        session.execute(rounds.attend(1, 0, X, one))
    project = shardworker_pb2.Project(layer=0, hidden=encode(X, tensor_pb2.DTYPE_BF16))
    assert session.execute(rounds.request(1, project=project, batch=one)).squares.shape == [1, 2]
    with pytest.raises(InvalidArgument, match="attend brings"):
        session.execute(rounds.attend(1, 0, X))
    with pytest.raises(InvalidArgument, match="squares: wanted"):
        session.execute(rounds.request(1, attend=shardworker_pb2.Attend(squares=encode(torch.ones(2, 2), F32))))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match="squares: wanted finite numbers, found NaN or infinity"):
            session.execute(rounds.request(1, attend=shardworker_pb2.Attend(squares=encode(torch.tensor([[1.0, bad]]), F32))))
    found = session.execute(rounds.request(1, attend=shardworker_pb2.Attend(squares=encode(torch.ones(1, 2), F32))))
    assert found.partial.dtype == tensor_pb2.DTYPE_BF16


def test_a_plan_without_such_norms_has_no_project(session: Session, rounds: Any, make_batch: Any) -> None:
    project = shardworker_pb2.Project(layer=0, hidden=encode(X, F32))
    with pytest.raises(StepMismatch, match="a batch comes with layer 0's attend"):
        session.execute(rounds.request(1, project=project, batch=make_batch((1, 0, 1, [0]))))


def test_a_dropped_session_refuses_and_holds_nothing(session: Session, rounds: Any, make_batch: Any) -> None:
    assert session.kv_bytes == 2 * 2 * 3 * 8 * 4 * 16 * 4
    session.execute(rounds.attend(1, 0, X, make_batch((1, 0, 1, [0]))))
    assert session.uncommitted_bytes == session.kv_bytes * 7 // 8
    session.drop()
    session.drop()
    assert session.kv_bytes == session.uncommitted_bytes == 0
    with pytest.raises(PlanMismatch, match="was dropped"):
        session.execute(rounds.attend(1, 1, X))


def test_kv_that_does_not_fit_names_both_figures(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    shard = tiny.shard(tiny.plan())
    monkeypatch.setattr(kv, "device_memory", lambda _: Memory(10**6, 10**5))
    Session(shard, 8, 0)
    with pytest.raises(OutOfMemory, match=r"8 pages of KV need 24576 bytes, 20000 are free"):
        Session(shard, 8, 80_000)
    with pytest.raises(OutOfMemory, match="need 824633720832 bytes"):
        Session(shard, 2**28, 0)


def test_more_pages_than_kernels_can_number_are_refused(tiny: Any) -> None:
    # The first of eight shards has none of six heads: its pages take no memory.
    shard = tiny.shard(tiny.plan(0, 8))
    assert Session(shard, 2**29 - 1, 0).kv_bytes == 0
    with pytest.raises(InvalidArgument, match="num_pages: 4294967295 pages of 4 tokens are more than the 2147483647"):
        Session(shard, 2**32 - 1, 0)
