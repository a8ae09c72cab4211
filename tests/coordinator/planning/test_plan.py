"""Plans against the checkpoints that they cut, against the worker's own sums, and at the true geometry of big models."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from coordinator.models.checkpoint import Checkpoint
from coordinator.models.config import Config, read_config
from coordinator.models.layout import has_own_head, match_layout, wanted_tensors
from coordinator.models.registry import describe
from coordinator.models.spec import Role
from coordinator.planning.plan import MeshPlan, default_dtype, plan_mesh
from protos import plan_pb2 as pb
from protos.digest import mesh_digest, shard_digest
from protos.errors import InvalidArgument, ModelError, TopologyError
from protos.tensor_pb2 import DTYPE_BF16, DTYPE_F16, DTYPE_F32, DTYPE_I32, DTYPE_INT8_BLOCK32
from shardworker.kernels.plain import PlainKernels
from shardworker.plan import check_plan
from shardworker.weights import META, Layout
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
SHARDS = (1, 2, 3, 4, 5, 8)
RESIDENT = {
    Role.ATTENTION_NORM,
    Role.FEED_FORWARD_NORM,
    Role.FINAL_NORM,
    Role.ROUTER,
    Role.ROUTER_CORRECTION,
    Role.SHARED_ROUTER,
    Role.EMBEDDING,
}
REPLICATED = ("q_norm.weight", "k_norm.weight")


@pytest.fixture(scope="module", params=list(tiny.CASES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    tiny.make_checkpoint(request.param, path)
    return path


def plan(directory: Path, num_shards: int, **settings: Any) -> MeshPlan:
    checkpoint = Checkpoint.open(directory)
    settings = {"dtype": DTYPE_F32, "quantization": pb.QUANTIZATION_NONE, **settings}
    return plan_mesh(describe(read_config(directory)), checkpoint, num_shards, **settings)


def public(name: str, num_shards: int, *, dtype: Any = DTYPE_BF16, quantization: Any = pb.QUANTIZATION_NONE) -> MeshPlan:
    config = Config("config.json", json.loads((CONFIGS / f"{name}.json").read_text()))
    return plan_mesh(describe(config), None, num_shards, dtype=dtype, quantization=quantization)


def slices(message: Any) -> Iterator[pb.TensorSlice]:
    if isinstance(message, pb.TensorSlice):
        yield message
        return
    for _, value in message.ListFields():
        for part in value if isinstance(value, list) or hasattr(value, "add") else [value]:
            if hasattr(part, "ListFields"):
                yield from slices(part)


def names(part: pb.TensorSlice) -> list[str]:
    return [part.name.replace("{expert}", str(expert)) for expert in range(part.num_experts)] or [part.name]


def uses(mesh: MeshPlan) -> dict[str, np.ndarray]:
    """How many shards hold each element of each tensor."""
    found: dict[str, np.ndarray] = {}
    for shard in mesh.shards:
        for part in slices(shard):
            for name in names(part):
                count = found.setdefault(name, np.zeros(tuple(part.shape), np.int64))
                count[tuple(slice(extent.start, extent.end) for extent in part.ranges)] += 1
    return found


@pytest.mark.parametrize("num_shards", SHARDS)
def test_every_element_is_held_once(folder: Path, num_shards: int) -> None:
    checkpoint = Checkpoint.open(folder)
    spec = match_layout(describe(read_config(folder)), checkpoint.tensors)
    mesh = plan(folder, num_shards)
    found = uses(mesh)
    shared = Counter(head for shard in mesh.shards for head in range(shard.kv_heads.start, shard.kv_heads.end))
    dim = spec.attention.head_dim
    for name, count in found.items():
        assert count.shape == checkpoint.tensors[name].shape
        if name.endswith(REPLICATED) and spec.attention.qk_norm == pb.QK_NORM_HEAD:
            assert (count == num_shards).all()
        elif ".k_proj." in name or ".v_proj." in name or name.endswith("k_norm.weight"):
            assert [int(count[head * dim].max()) for head in range(len(shared))] == [shared[head] for head in range(len(shared))]
            assert (count.reshape(len(shared), -1) == count.reshape(len(shared), -1)[:, :1]).all()
        else:
            assert (count == 1).all(), name
    own_head = has_own_head(spec, checkpoint.tensors)
    whole = {name: tensor.role for tensor in wanted_tensors(spec, own_head=own_head) for name in tensor.names()}
    resident = {name for name, role in whole.items() if role in RESIDENT}
    assert found.keys() | resident == whole.keys()
    assert found.keys() & resident == (set() if own_head else {spec.name(Role.EMBEDDING)})
    read_by_nobody = checkpoint.tensors.keys() - whole.keys()
    assert all(name.startswith(f"model.layers.{spec.num_layers}.") or "rotary" in name for name in read_by_nobody)


@pytest.mark.parametrize("num_shards", SHARDS)
def test_rows_and_columns_of_a_shard_belong_together(folder: Path, num_shards: int) -> None:
    for shard in plan(folder, num_shards).shards:
        dim = shard.attention.head_dim
        for layer in shard.layers:
            attention = layer.attention
            assert (
                attention.q.ranges[0]
                == attention.o.ranges[1]
                == pb.Range(start=shard.heads.start * dim, end=shard.heads.end * dim)
            )
            assert attention.k.ranges[0] == attention.v.ranges[0]
            assert attention.k.ranges[0] == pb.Range(start=shard.kv_heads.start * dim, end=shard.kv_heads.end * dim)
            assert attention.HasField("o_bias") <= (shard.shard == 0)
            block = layer.dense if layer.HasField("dense") else layer.experts
            up, gate, down = block.up.ranges[-2], block.gate.ranges[-2], block.down.ranges[-1]
            assert gate == down
            # Fused, up's rows follow all of gate's.
            offset = 0 if len(block.up.shape) == 2 else block.up.shape[1] // 2
            assert (up.start, up.end) == (gate.start + offset, gate.end + offset)
            assert gate.start % 32 == 0
        assert shard.head.ranges[0] == shard.vocabulary


@pytest.mark.parametrize("quantization", [pb.QUANTIZATION_NONE, pb.QUANTIZATION_INT8, pb.QUANTIZATION_INT4])
@pytest.mark.parametrize("dtype", [DTYPE_F32, DTYPE_BF16])
def test_worker_accepts_the_plan_and_takes_the_bytes_foretold(folder: Path, dtype: Any, quantization: Any) -> None:
    for num_shards in (1, 3, 8):
        mesh = plan(folder, num_shards, dtype=dtype, quantization=quantization)
        for shard, foretold in zip(mesh.shards, mesh.weight_bytes, strict=True):
            check_plan(shard)
            assert Layout(shard, META, PlainKernels(META)).num_bytes == foretold


def test_random_weights_have_the_same_slices(folder: Path) -> None:
    config = read_config(folder)
    spec = describe(config)
    checkpoint = Checkpoint.open(folder)
    random = plan_mesh(spec, None, 2, dtype=DTYPE_F32, quantization=pb.QUANTIZATION_NONE)
    stored = plan_mesh(spec, checkpoint, 2, dtype=DTYPE_F32, quantization=pb.QUANTIZATION_NONE)
    assert random.weight_bytes == stored.weight_bytes
    for shard in random.shards:
        check_plan(shard)
        assert shard.random_weights
        assert not shard.files
    assert random.digest != stored.digest


def test_digests_name_shards_and_mesh(tmp_path: Path) -> None:
    tiny.make_checkpoint("qwen3_moe", tmp_path)
    mesh = plan(tmp_path, 4)
    assert mesh.shard_digests == tuple(shard_digest(shard) for shard in mesh.shards)
    assert mesh.digest == mesh_digest(mesh.shard_digests)
    assert len(set(mesh.shard_digests)) == 4
    assert plan(tmp_path, 4) == mesh
    others = [plan(tmp_path, 2), plan(tmp_path, 4, quantization=pb.QUANTIZATION_INT8), plan(tmp_path, 4, page_tokens=8)]
    assert mesh.digest not in {other.digest for other in others}


def test_biases_of_o_and_down_are_on_shard_0_alone(tmp_path: Path) -> None:
    tiny.make_checkpoint("llama_biases", tmp_path)
    mesh = plan(tmp_path, 4)
    layers = [shard.layers[0] for shard in mesh.shards]
    assert [layer.attention.HasField("o_bias") for layer in layers] == [True, False, False, False]
    assert [layer.dense.HasField("down_bias") for layer in layers] == [True, False, False, False]
    assert all(layer.attention.HasField("q_bias") and layer.dense.HasField("up_bias") for layer in layers)


def test_fused_and_single_experts_give_the_same_weights(tmp_path: Path) -> None:
    single, fused = tmp_path / "single", tmp_path / "fused"
    tiny.make_checkpoint("mixtral", single)
    model = tiny.oracle(single)
    model.save_pretrained(fused, save_original_format=False)
    for one, other in zip(plan(single, 3).shards, plan(fused, 3).shards, strict=True):
        for kind in ("gate", "up", "down"):
            parts = [getattr(shard.layers[1].experts, kind) for shard in (one, other)]
            assert np.array_equal(read(single, parts[0]), read(fused, parts[1]))


def read(directory: Path, part: pb.TensorSlice) -> np.ndarray:
    checkpoint = Checkpoint.open(directory)
    ranges = tuple(slice(extent.start, extent.end) for extent in part.ranges)
    found = [np.frombuffer(checkpoint.read(name), np.float32).reshape(part.shape)[ranges] for name in names(part)]
    return np.stack(found) if part.num_experts else found[0]


def test_intellect_3_in_8_shards() -> None:
    mesh = public("intellect-3", 8)
    assert [shard.heads.end - shard.heads.start for shard in mesh.shards] == [12] * 8
    assert [shard.kv_heads.end - shard.kv_heads.start for shard in mesh.shards] == [1] * 8
    experts = [layer.experts.down.ranges[1] for layer in (shard.layers[1] for shard in mesh.shards)]
    assert [extent.end - extent.start for extent in experts] == [160, 192] * 4
    dense = [shard.layers[0].dense.down.ranges[1] for shard in mesh.shards]
    assert [extent.end - extent.start for extent in dense] == [1344, 1376, 1376, 1376] * 2
    assert {shard.vocabulary.end - shard.vocabulary.start for shard in mesh.shards} == {18944}
    assert sum(mesh.kv_bytes_per_token) == 184 * 1024
    # 199.03 GiB in all, less the embedding, norms and gates, which the coordinator keeps.
    resident = 151552 * 4096 + 4096 * (2 * 46 + 1) + 45 * (128 * 4096 + 128)
    assert sum(mesh.weight_bytes) == (106_852_251_264 - resident) * 2


@pytest.mark.parametrize(
    ("name", "kib"), [("qwen3-30b-a3b", 96), ("mixtral-8x7b", 128), ("qwen1.5-moe-a2.7b", 192), ("llama-3.1-8b", 128)]
)
def test_kv_bytes_of_public_models(name: str, kib: int) -> None:
    assert public(name, 4).kv_bytes_per_token == (kib * 256,) * 4


def test_kv_heads_are_replicated_where_shards_outnumber_them() -> None:
    mesh = public("qwen3-30b-a3b", 8)
    assert [(shard.kv_heads.start, shard.kv_heads.end) for shard in mesh.shards] == [(i // 2, i // 2 + 1) for i in range(8)]
    assert sum(mesh.kv_bytes_per_token) == 2 * 96 * 1024


def test_quantized_bytes_of_a_public_model() -> None:
    plain, int8, int4 = (
        sum(public("qwen3-30b-a3b", 4, quantization=kind).weight_bytes)
        for kind in (pb.QUANTIZATION_NONE, pb.QUANTIZATION_INT8, pb.QUANTIZATION_INT4)
    )
    head = 151936 * 2048
    norms = 48 * (32 + 4) * 128 * 2
    matrices = (plain - norms) // 2 - head
    assert int8 == (matrices + head) // 32 * 34 + norms
    assert int4 == matrices // 32 * 18 + head // 32 * 34 + norms


@pytest.mark.parametrize(
    ("name", "shards", "message"),
    [
        ("smollm2-135m", 16, "attention with 9 heads cannot be cut into 16 shards, at most into 9"),
        ("intellect-3", 64, "an expert of 1408 columns, in groups of 32 cannot be cut into 64 shards, at most into 44"),
        ("intellect-3", 0, "at least 1 shard, found 0"),
    ],
)
def test_model_that_cannot_be_cut_is_refused(name: str, shards: int, message: str) -> None:
    with pytest.raises(TopologyError, match=message):
        public(name, shards)


def test_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    tiny.make_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(
        ModelError, match=r"has no tensor 'model\.layers\.3\.input_layernorm\.weight', nor 8 others that it needs"
    ):
        plan(tmp_path, 2)


@pytest.mark.parametrize(
    "settings",
    [{"dtype": DTYPE_I32}, {"dtype": DTYPE_INT8_BLOCK32}, {"quantization": pb.QUANTIZATION_UNSPECIFIED}, {"page_tokens": 0}],
)
def test_settings_that_no_plan_may_have_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    tiny.make_checkpoint("llama", tmp_path)
    with pytest.raises(InvalidArgument, match="a plan needs"):
        plan(tmp_path, 1, **settings)


@pytest.mark.parametrize(("name", "dtype"), [("llama", DTYPE_F32), ("llama_bf16", DTYPE_BF16), ("qwen3_moe_f16", DTYPE_F16)])
def test_default_dtype_is_the_models(tmp_path: Path, name: str, dtype: Any) -> None:
    tiny.make_checkpoint(name, tmp_path)
    config = read_config(tmp_path)
    assert default_dtype(config, Checkpoint.open(tmp_path)) == dtype
    assert default_dtype(config, None) == dtype


def test_default_dtype_without_any_word_is_bf16() -> None:
    assert default_dtype(Config("config.json", {}), None) == DTYPE_BF16
    assert default_dtype(Config("config.json", {"torch_dtype": "torch.float16"}), None) == DTYPE_F16


def test_planning_does_not_import_torch() -> None:
    code = "import sys, coordinator.planning.placement, coordinator.models.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
