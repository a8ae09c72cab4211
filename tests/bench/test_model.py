"""The formula of a step's time: what grows with what, and that constants which made a benchmark are found again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.model import Costs, Mesh, Network, Work, calibrate, decode_work, distinct_experts, step_s
from coordinator.models.config import Config
from coordinator.models.registry import describe
from protos.plan_pb2 import QUANTIZATION_INT4, QUANTIZATION_NONE
from protos.tensor_pb2 import DTYPE_BF16, DTYPE_F32, DTYPE_INT8_BLOCK32

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
COSTS = Costs(round_s=3e-4, shard_s=1e-4, byte_s=4e-9, bytes_per_s=20e9, operations_per_s=5e11)


def cut(name: str, shards: int, *, layers: int | None = None, wire: Any = DTYPE_BF16, quantized: bool = True) -> Mesh:
    spec = describe(Config(name, json.loads((CONFIGS / f"{name}.json").read_text())))
    if layers:
        spec = replace(spec, feed_forward=spec.feed_forward[:layers])
    quantization = QUANTIZATION_INT4 if quantized else QUANTIZATION_NONE
    return Mesh.cut(spec, shards, dtype=DTYPE_BF16, quantization=quantization, wire=wire)


def test_a_decode_step_has_two_rounds_a_layer_and_one_for_the_head() -> None:
    assert cut("qwen3-30b-a3b", 2).step(1, 1, 0).rounds == 97
    # q and k are normed over all heads, so their squares are summed first.
    assert cut("olmoe-1b-7b", 2).step(1, 1, 0).rounds == 3 * 16 + 1


def test_a_decoded_token_reads_and_multiplies_the_active_weights() -> None:
    work = cut("qwen3-30b-a3b", 1, quantized=False).step(1, 1, 0)
    assert work.read_bytes == pytest.approx(2 * 3.03e9, rel=0.02)
    assert work.operations == pytest.approx(2 * 3.03e9, rel=0.02)


def test_four_workers_read_a_quarter_each_and_move_four_times_the_bytes() -> None:
    one, four = (cut("qwen3-30b-a3b", shards).step(1, 1, 0) for shards in (1, 4))
    assert four.read_bytes == pytest.approx(one.read_bytes / 4, rel=0.01)
    assert four.operations == pytest.approx(one.operations / 4, rel=0.01)
    assert four.bytes == 4 * one.bytes


def test_the_wire_halves_and_halves_again_what_rows_take() -> None:
    sizes = [cut("mixtral-8x7b", 1, wire=wire).step(512, 1, 512).bytes for wire in (DTYPE_F32, DTYPE_BF16, DTYPE_INT8_BLOCK32)]
    assert sizes[1] / sizes[0] == pytest.approx(1 / 2, rel=0.01)
    assert sizes[2] / sizes[0] == pytest.approx(34 / 128, rel=0.01)


def test_rows_touch_experts_until_all_are_touched() -> None:
    block = cut("qwen3-30b-a3b", 1).spec.feed_forward[0]
    assert [distinct_experts(block, rows) for rows in (1, 16, 512)] == [8, 82, 128]
    assert distinct_experts(cut("llama-3.1-8b", 1).spec.feed_forward[0], 7) == 0


def test_time_grows_by_rounds_times_round_trip_and_bytes_by_rate() -> None:
    work = cut("qwen3-30b-a3b", 2).step(1, 1, 100)
    still = step_s(work, COSTS, Network())
    assert step_s(work, COSTS, Network(rtt_s=1e-3)) - still == pytest.approx(97e-3)
    packets = 97 * 2 * 1514
    assert step_s(work, COSTS, Network(bytes_per_s=125e6)) - still == pytest.approx((work.bytes + packets) / 125e6)


def test_time_is_linear_in_layers() -> None:
    times = [step_s(cut("qwen3-30b-a3b", 2, layers=layers).step(1, 1, 0), COSTS, Network(1e-3)) for layers in (8, 16, 24)]
    assert times[2] - times[1] == pytest.approx(times[1] - times[0])


def test_a_long_prompt_is_several_steps_and_only_the_last_one_samples() -> None:
    mesh = cut("qwen3-30b-a3b", 1)
    steps = mesh.prefill(1100)
    # A step that samples nothing needs neither the last layer's feed-forward block nor the head.
    assert [step.rounds for step in steps] == [95, 95, 97]
    assert steps == [mesh.step(512, 0, 512), mesh.step(512, 0, 1024), mesh.step(76, 1, 1100)]


def as_report(mesh: Mesh, costs: Costs) -> dict[str, Any]:
    """What `coordctl bench` would say if the formula were the truth."""

    def cost(work: Work) -> dict[str, float]:
        compute_s = max(work.read_bytes / costs.bytes_per_s, work.operations / costs.operations_per_s)
        beyond = step_s(work, costs, Network()) - compute_s
        return {
            "compute_ms": compute_s * 1e3,
            "wire_ms": beyond * 700,
            "coordinator_ms": beyond * 300,
            "rounds": work.rounds,
            "bytes_sent": work.bytes / 2,
            "bytes_received": work.bytes / 2,
        }

    (prompt,) = mesh.prefill(512)
    return {
        "shards": len(mesh.shards),
        "prompt_tokens": 512,
        "new_tokens": 64,
        "per_token": cost(decode_work(mesh, 1, 512, 64)),
        "per_prompt": cost(prompt),
    }


def test_constants_are_found_again() -> None:
    meshes = [cut("qwen3-30b-a3b", shards, layers=4) for shards in (1, 2, 4)]
    found = calibrate([as_report(mesh, COSTS) for mesh in meshes], meshes)
    for name in ("round_s", "shard_s", "byte_s", "bytes_per_s", "operations_per_s"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=1e-6), name


def test_what_one_size_cannot_tell_apart_is_put_into_the_round() -> None:
    mesh = cut("qwen3-30b-a3b", 2, layers=4)
    found = calibrate([as_report(mesh, COSTS)], [mesh])
    assert found.shard_s == 0
    for work in (decode_work(mesh, 1, 512, 64), *mesh.prefill(512)):
        assert step_s(work, found, Network()) == pytest.approx(step_s(work, COSTS, Network()))


def test_a_prompt_that_only_reads_is_taken_to_compute_no_slower_than_decoding() -> None:
    mesh = cut("qwen3-30b-a3b", 1, layers=4)
    report = as_report(mesh, COSTS)
    report["per_prompt"]["compute_ms"] *= 1000
    token = decode_work(mesh, 1, 512, 64)
    assert step_s(token, calibrate([report], [mesh]), Network()) == pytest.approx(step_s(token, COSTS, Network()))
