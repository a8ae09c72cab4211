"""The memory's rate and what workers make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.bench.machine import describe_machine, peak_rss_bytes
from coordinator.bench.roofline import Roofline, token_bytes
from coordinator.models.config import read_config
from coordinator.models.registry import describe
from coordinator.planning.plan import plan_mesh
from protos.plan_pb2 import QUANTIZATION_INT4
from protos.tensor_pb2 import DTYPE_BF16

ROOT = Path(__file__).parents[3]


def test_fraction_is_that_of_the_worker_that_computes_longest() -> None:
    found = Roofline(20e9, 15e9, bytes_per_token=(100e6, 90e6), compute_s=(0.02, 0.03))
    assert found.bytes_per_s == 20e9
    assert found.fractions == pytest.approx((0.5, 0.3))
    assert found.fraction == pytest.approx(0.3)
    assert found.as_dict()["fraction"] == found.fraction


def test_bytes_of_a_token_are_all_but_those_of_idle_experts() -> None:
    spec = describe(read_config(ROOT / "bench" / "models" / "a3b-4l"))
    plans = [plan_mesh(spec, None, shards, dtype=DTYPE_BF16, quantization=QUANTIZATION_INT4) for shards in (1, 2)]
    # 120 of 128 experts in 4 layers, three matrices each, 18 bytes for 32 weights.
    idle = 4 * 120 * 3 * 768 * 2048 * 18 // 32
    for plan in plans:
        assert sum(token_bytes(spec, plan.shards, 0)) == sum(plan.weight_bytes) - idle
    # Keys and values of 4 heads of 128 in bfloat16.
    (none,), (some,) = (token_bytes(spec, plans[0].shards, tokens) for tokens in (0, 10.5))
    assert some - none == 10.5 * 4 * 2 * 4 * 128 * 2


def test_machine_is_described() -> None:
    found = describe_machine()
    assert found["cpu"]
    assert {"cores", "torch", "torch_cpu", "memory_bytes"} <= set(found)


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_rss_bytes()
    block = bytearray(b"x" * (before + 2**24))
    assert peak_rss_bytes() >= len(block)
