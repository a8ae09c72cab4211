"""The coordinator's own weights, from a file and at random."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from coordinator.models.checkpoint import Checkpoint
from coordinator.models.spec import DenseSpec, GateSpec, ModelSpec, MoeSpec, Role, Scoring
from coordinator.resident import load_resident, random_resident
from protos.plan_pb2 import AttentionSpec

HIDDEN, VOCABULARY, EXPERTS = 6, 11, 4
GATE = GateSpec(EXPERTS, 2, Scoring.SIGMOID, renormalize=True, corrected=True)
SPEC = ModelSpec(
    family="test",
    hidden=HIDDEN,
    vocabulary=VOCABULARY,
    context=10,
    norm_eps=1e-5,
    attention=AttentionSpec(),
    feed_forward=(DenseSpec(4), MoeSpec(GATE, width=4, shared_width=4, shared_gated=True)),
    tied=True,
    names={
        Role.EMBEDDING: "embed",
        Role.FINAL_NORM: "norm",
        Role.ATTENTION_NORM: "{layer}.a",
        Role.FEED_FORWARD_NORM: "{layer}.f",
        Role.ROUTER: "{layer}.r",
        Role.ROUTER_CORRECTION: "{layer}.c",
        Role.SHARED_ROUTER: "{layer}.s",
    },
    fused_names={},
    stop_ids=(),
)
SHAPES = {
    "embed": (VOCABULARY, HIDDEN),
    "norm": (HIDDEN,),
    "0.a": (HIDDEN,),
    "0.f": (HIDDEN,),
    "1.a": (HIDDEN,),
    "1.f": (HIDDEN,),
}
SHAPES |= {"1.r": (EXPERTS, HIDDEN), "1.c": (EXPERTS,), "1.s": (1, HIDDEN)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_those_of_the_file_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    # An odd name in front, so that the embedding does not begin at the file's first data byte.
    save_file({"before": torch.zeros(3, dtype=dtype), **tensors}, tmp_path / "model.safetensors")
    resident = load_resident(SPEC, Checkpoint.open(tmp_path))
    wanted = {name: tensor.float() for name, tensor in tensors.items()}
    dense, moe = resident.layers
    assert torch.equal(resident.final_norm, wanted["norm"])
    assert torch.equal(dense.attention_norm, wanted["0.a"])
    assert (dense.router, dense.correction, dense.shared_router) == (None, None, None)
    for found, name in [(moe.feed_forward_norm, "1.f"), (moe.router, "1.r"), (moe.correction, "1.c"), (moe.shared_router, "1.s")]:
        assert found is not None
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted[name])
    rows = resident.embed([3, 0, 10, 3])
    assert rows.dtype == torch.float32
    assert torch.equal(rows, wanted["embed"][[3, 0, 10, 3]])


def test_random_weights_have_the_true_shapes_and_are_the_same_each_time() -> None:
    first, second = random_resident(SPEC), random_resident(SPEC)
    moe = first.layers[1]
    assert moe.router is not None
    assert moe.correction is not None
    assert moe.shared_router is not None
    assert [tuple(one.shape) for one in (moe.router, moe.correction, moe.shared_router)] == [
        (EXPERTS, HIDDEN),
        (EXPERTS,),
        (1, HIDDEN),
    ]
    assert first.layers[0].router is None
    assert torch.equal(first.final_norm, torch.ones(HIDDEN))
    assert torch.equal(first.embed([1, 2]), second.embed([1, 2]))
    assert tuple(first.embed([1, 2]).shape) == (2, HIDDEN)
    assert torch.equal(moe.router, second.layers[1].router)  # type: ignore[arg-type]
