from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from protos import plan_pb2, tensor_pb2
from protos.errors import ModelError, OutOfMemory
from shardworker import loader
from shardworker.kernels.linear import DenseWeight, GroupedWeight
from shardworker.kernels.plain import PlainKernels
from shardworker.loader import LoadCancelled, load_weights
from shardworker.memory import Memory
from shardworker.plan import check_plan
from shardworker.source import Folder, Pieces
from shardworker.weights import META, Layout

KERNELS = PlainKernels(torch.device("cpu"))


def load(tiny: Any, plan: plan_pb2.ShardPlan | None = None) -> Any:
    weights, num_bytes = load_weights(plan or tiny.plan(), str(tiny.directory), KERNELS, lambda _: None, lambda: False)
    assert num_bytes == Layout(plan or tiny.plan(), META, KERNELS).num_bytes
    return weights


def stored(tiny: Any, part: plan_pb2.TensorSlice) -> torch.Tensor:
    """What the safetensors library reads for a slice."""

    def one(name: str) -> torch.Tensor:
        for number in range(tiny.num_files):
            with safe_open(tiny.directory / f"{number}.safetensors", "pt") as file:
                if name in file.keys():  # noqa: SIM118  # not a dict
                    return file.get_slice(name)[tuple(slice(r.start, r.end) for r in part.ranges)]
        raise KeyError(name)

    if part.num_experts:
        return torch.stack([one(part.name.replace("{expert}", str(e))) for e in range(part.num_experts)])
    return one(part.name)


def check(tiny: Any, plan: plan_pb2.ShardPlan, dtype: torch.dtype) -> None:
    weights = load(tiny, plan)
    for layer, parts in zip(weights.layers, plan.layers, strict=True):
        a = parts.attention
        wanted = torch.cat([stored(tiny, part) for part in (a.q, a.k, a.v)]).to(dtype)
        assert torch.equal(layer.attention.qkv.tensor, wanted)
        assert torch.equal(layer.attention.o.tensor, stored(tiny, a.o).to(dtype))
        biases = torch.cat([stored(tiny, part) for part in (a.q_bias, a.k_bias, a.v_bias)])
        assert torch.equal(layer.attention.qkv_bias, biases.to(dtype))
        assert (layer.attention.o_bias is None) == (plan.shard > 0)
    dense, experts = weights.layers[0].feed_forward, weights.layers[1].feed_forward
    for found, part in ((dense, plan.layers[0].dense), (experts, plan.layers[1].experts)):
        gate_up = torch.cat([stored(tiny, part.gate), stored(tiny, part.up)], -2)
        assert torch.equal(found.gate_up.tensor, gate_up.to(dtype))
        assert torch.equal(found.down.tensor, stored(tiny, part.down).to(dtype))
    assert torch.equal(weights.head.tensor, stored(tiny, plan.head).to(dtype))


@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
def test_slices_equal_the_safetensors_library(
    make_tiny: Any, file_dtype: torch.dtype, dtype: torch.dtype, *, fused: bool
) -> None:
    codes = {
        torch.float32: tensor_pb2.DTYPE_F32, torch.bfloat16: tensor_pb2.DTYPE_BF16, torch.float16: tensor_pb2.DTYPE_F16
    }  # fmt: skip
    tiny = make_tiny(file_dtype=file_dtype, dtype=codes[dtype], fused=fused, num_files=3)
    for shard in range(2):
        check(tiny, tiny.plan(shard, 2), dtype)


@pytest.mark.parametrize("segment", [1, 100, 1 << 20])
@pytest.mark.parametrize("staging", [512, 1000, 1 << 20])
def test_any_staging_and_segment_size_reads_the_same(
    monkeypatch: pytest.MonkeyPatch, make_tiny: Any, segment: int, staging: int
) -> None:
    monkeypatch.setattr(Folder, "smallest_piece", segment)
    monkeypatch.setattr(loader, "STAGING_BYTES", staging)
    tiny = make_tiny()
    check(tiny, tiny.plan(1, 2), torch.float32)


def test_only_the_slices_are_read(monkeypatch: pytest.MonkeyPatch, make_tiny: Any) -> None:
    tiny = make_tiny(hidden=64, dense=512)
    monkeypatch.setattr(Folder, "smallest_piece", 1)
    counts = [0]
    read = Folder.read_into

    def count(self: Folder, file: str, pieces: Pieces, buffer: memoryview) -> None:
        counts[0] += len(buffer)
        read(self, file, pieces, buffer)

    monkeypatch.setattr(Folder, "read_into", count)
    plan = tiny.plan(0, 2)
    load(tiny, plan)
    # In float32 each byte of the slice is read once; the norms once for each head.
    assert counts[0] == Layout(plan, META, KERNELS).num_bytes


@pytest.mark.parametrize(("quantization", "bits"), [(plan_pb2.QUANTIZATION_INT8, 8), (plan_pb2.QUANTIZATION_INT4, 4)])
def test_quantized_while_loading_equals_quantized_whole(make_tiny: Any, quantization: int, bits: int) -> None:
    tiny = make_tiny(quantization=quantization)
    plan = tiny.plan(1, 2)
    weights = load(tiny, plan)
    part = plan.layers[1].experts
    for found, wanted in (
        (weights.layers[1].feed_forward.down, stored(tiny, part.down)),
        (weights.layers[1].feed_forward.gate_up, torch.cat([stored(tiny, part.gate), stored(tiny, part.up)], 1)),
        (weights.layers[0].attention.o, stored(tiny, plan.layers[0].attention.o)),
        (weights.head, stored(tiny, plan.head)),
    ):
        whole = GroupedWeight.empty(tuple(wanted.shape), bits, torch.float32, KERNELS.device)
        whole.store(0, wanted.reshape(-1, wanted.shape[-1]))
        assert torch.equal(found.values, whole.values)
        assert torch.equal(found.scales, whole.scales)
    assert weights.layers[0].attention.qk_norm.dtype == torch.float32


def test_progress_rises_to_the_whole(tiny: Any) -> None:
    reports: list[loader.Progress] = []
    _, num_bytes = load_weights(tiny.plan(), str(tiny.directory), KERNELS, reports.append, lambda: False)
    done = [report.loaded_bytes for report in reports]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == num_bytes == reports[0].total_bytes


def test_a_load_ends_between_two_reads_when_cancelled(tiny: Any) -> None:
    reports: list[loader.Progress] = []
    with pytest.raises(LoadCancelled):
        load_weights(tiny.plan(), str(tiny.directory), KERNELS, reports.append, lambda: len(reports) > 3)
    assert len(reports) == 4


def test_random_weights_are_reproducible_and_sized_like_the_model(tiny: Any) -> None:
    plan = tiny.plan(random_weights=True)
    first, second = (load_weights(plan, "", KERNELS, lambda _: None, lambda: False)[0] for _ in range(2))
    gate_up = first.layers[1].feed_forward.gate_up
    assert torch.equal(gate_up.tensor, second.layers[1].feed_forward.gate_up.tensor)
    assert isinstance(gate_up, DenseWeight)
    assert 0.018 < float(gate_up.tensor.std()) < 0.022
    assert not torch.equal(gate_up.tensor[0], gate_up.tensor[1])
    assert torch.equal(first.layers[0].attention.qk_norm, torch.ones(9, 16))
    assert first.head.tensor.shape == (50, 64)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda d: (d / "1.safetensors").unlink(), "cannot open checkpoint file 1.safetensors"),
        (lambda d: os.truncate(d / "1.safetensors", 5000), "1.safetensors is truncated"),
        (lambda d: (d / "1.safetensors").write_bytes(b"GGUF" * 100), "1.safetensors is no safetensors file: its header would be"),
        (lambda d: save_file({"x": torch.zeros(3)}, d / "1.safetensors"), r"1.safetensors differs: wanted \d+ bytes, found \d+"),
    ],
    ids=["missing", "truncated", "foreign", "another"],
)
def test_a_damaged_folder_is_named(tiny: Any, damage: Any, text: str) -> None:
    plan = tiny.plan()
    damage(tiny.directory)
    with pytest.raises(ModelError, match=text):
        load(tiny, plan)


def test_same_size_with_other_contents_is_refused(tiny: Any) -> None:
    plan = tiny.plan()
    tiny.tensors["head"].add_(1)
    tiny.write()
    with pytest.raises(ModelError, match="differs from the coordinator's"):
        load(tiny, plan)


@pytest.mark.parametrize("directory", ["", "/no/such/folder", "a\0b", "a" * 5000, "/" + "a/" * 5000])
def test_a_missing_folder_is_named(tiny: Any, directory: str) -> None:
    with pytest.raises(ModelError, match="no folder"):
        load_weights(tiny.plan(), directory, KERNELS, lambda _: None, lambda: False)


def test_a_missing_or_different_tensor_is_named(tiny: Any) -> None:
    tiny.tensors["head"] = torch.zeros(50, 64, dtype=torch.int32)
    tiny.write()
    with pytest.raises(ModelError, match=r"tensor 'head' in .*: wanted dtype F32, BF16 or F16, found I32"):
        load(tiny, tiny.plan())
    plan = tiny.plan()
    plan.head.name = "lm_head"
    with pytest.raises(ModelError, match="no tensor 'lm_head'"):
        load(tiny, plan)
    plan.head.name, plan.head.shape[0] = "1.q", 51
    with pytest.raises(ModelError, match=r"tensor '1.q' in .*: wanted shape \[51, 64\], found \[96, 64\]"):
        load(tiny, plan)


def test_links_as_in_the_hub_cache_are_followed(tiny: Any) -> None:
    plan = tiny.plan()
    for number in range(tiny.num_files):
        path = tiny.directory / f"{number}.safetensors"
        path.rename(tiny.directory / f"blob{number}")
        path.symlink_to(f"blob{number}")
    load(tiny, plan)


def test_a_slice_of_more_bytes_than_can_be_counted_is_refused(tiny: Any) -> None:
    plan = tiny.plan(random_weights=True)
    # More than `check_plan` lets pass: sizes of 2**24 overflow only together.
    experts, huge = plan.layers[1].experts, 2**31
    for part in (experts.gate, experts.up, experts.down):
        part.num_experts = experts.num_experts = huge
        column = 1 if part is experts.down else 0
        part.shape[column] = part.ranges[column].end = huge
    with pytest.raises(OutOfMemory, match="more bytes than can be counted"):
        load(tiny, plan)


def test_experts_without_columns_are_not_listed(tiny: Any) -> None:
    plan = tiny.plan()
    experts = plan.layers[1].experts
    for part in (experts.gate, experts.up, experts.down):
        part.num_experts = experts.num_experts = 2**24
        extent = part.ranges[1 if part is experts.down else 0]
        extent.end = extent.start
    check_plan(plan)
    tracemalloc.start()
    with pytest.raises(ModelError, match=r"no tensor '1\.4\.gate'"):
        load(tiny, plan)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_too_little_memory_names_both_figures(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    monkeypatch.setattr(loader, "device_memory", lambda _: Memory(1000, 500))
    with pytest.raises(OutOfMemory, match=r"needs \d+ bytes, 500 are free"):
        load(tiny)


MEASURE = """
import sys, torch
from pathlib import Path
from protos.plan_pb2 import ShardPlan
from shardworker.kernels.plain import PlainKernels
from shardworker.loader import load_weights
def rss(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field): return int(line.split()[1]) * 1024
plan = ShardPlan.FromString(Path(sys.argv[1]).read_bytes())
torch.set_num_threads(1)
torch.randn(64, 64) @ torch.randn(64, 64); torch.randn(64).bfloat16().float()
before = rss("VmRSS")
weights, size = load_weights(plan, sys.argv[2], PlainKernels(torch.device("cpu")), lambda p: None, lambda: False)
print(rss("VmHWM") - before, size)
"""


@pytest.mark.parametrize("quantization", [plan_pb2.QUANTIZATION_NONE, plan_pb2.QUANTIZATION_INT4])
def test_peak_memory_is_the_slice_and_the_staging(make_tiny: Any, quantization: int) -> None:
    tiny = make_tiny(
        hidden=1024, dense=8192, columns=1024, experts=4, file_dtype=torch.bfloat16,
        dtype=tensor_pb2.DTYPE_BF16, quantization=quantization,
    )  # fmt: skip
    plan = tiny.plan(0, 2)
    tiny.tensors.clear()
    gc.collect()
    (tiny.directory / "plan").write_bytes(plan.SerializeToString())
    command = [sys.executable, "-c", MEASURE, str(tiny.directory / "plan"), str(tiny.directory)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    rise, size = map(int, output.split())
    assert size > 6 << 20
    # The staging buffer, and what code and allocator take when first used.
    assert rise < size + loader.STAGING_BYTES + (16 << 20), (rise, size)
