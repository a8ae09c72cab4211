"""A benchmark's result as JSON and as tables."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from coordinator.bench.load import Load, Workload
from coordinator.bench.overhead import compare_overheads
from coordinator.bench.report import Report, Streams, WorkerUse
from coordinator.bench.roofline import Roofline
from coordinator.bench.statistics import StepCost
from coordinator.config import ModelSettings
from protos.generation_pb2 import GetModelResponse
from protos.tensor_pb2 import DTYPE_BF16

COST = StepCost(20.0, 9.0, 3.0, 3.0, 8.0, 3.0, 600.0, 330.0)


def streams(count: int, *seconds: float) -> Streams:
    """Prompts of 10 tokens that took a second, then 4 tokens in each of `seconds`."""
    loads = [
        Load(0, 10, tuple(tuple(round((1 + time * token) * 1e9) for token in range(5)) for _ in range(count))) for time in seconds
    ]
    return Streams(count, tuple(loads), COST)


@pytest.fixture
def report() -> Report:
    overhead, by_action = compare_overheads({"attend": [300.0, 500.0], "head": [200.0]}, {"attend": [200.0], "head": [100.0]})
    return Report(
        settings=ModelSettings("[bold]model", quantization="int4"),
        model=GetModelResponse(family="qwen3_moe", dtype=DTYPE_BF16),
        device="cpu",
        kernels="torch",
        threads=2,
        load_s=1.5,
        work=Workload(10, 5, 4, 3),
        single=streams(1, 0.5, 0.25, 0.1),
        prompt=COST,
        concurrent=streams(4, 0.5, 0.5, 1),
        overhead=overhead,
        overhead_by_action=by_action,
        roofline=Roofline(20e9, 18e9, (100e6, 90e6), (0.02, 0.01)),
        workers=(WorkerUse(10, 20, 30, 0.02), WorkerUse(11, 21, 31, 0.01)),
        coordinator_peak_rss_bytes=99,
        preemptions=0,
        machine={"cpu": "CPU", "cores": 2, "memory_bytes": 2**30, "torch": "2"},
    )


def shown(report: Report) -> str:
    file = io.StringIO()
    report.print(Console(file=file, width=200))
    return file.getvalue()


def test_object_has_the_keys_of_the_contract(report: Report) -> None:
    found = json.loads(json.dumps(report.as_dict()))
    assert found["prefill"] == {"tokens_per_s": {"min": 10, "median": 10, "max": 10}}
    assert found["decode"] == {"tokens_per_s": {"min": 2, "median": 4, "max": 10}}
    assert set(found["round"]["overhead_us"]) == {"min", "median", "max"}
    assert found["round"]["ratio"] == 300 / 150
    assert found["round"]["actions"]["attend"]["ratio"] == 2
    assert found["roofline"]["bytes_per_s"] == 20e9
    assert found["roofline"]["fraction"] == 0.5
    assert found["workers"][1] == {"slice_bytes": 11, "kv_bytes": 21, "peak_rss_bytes": 31, "compute_ms_per_token": 10}
    assert found["coordinator"] == {"peak_rss_bytes": 99}
    assert (found["dtype"], found["quantization"], found["wire"], found["load_format"]) == ("bf16", "int4", "bf16", "auto")
    assert (found["shards"], found["threads"], found["repeats"]) == (2, 2, 3)
    assert found["per_token"]["compute_ms"] == found["per_prompt"]["compute_ms"] == 9


def test_object_says_what_many_streams_gain(report: Report) -> None:
    found = report.as_dict()["concurrent"]
    assert found["streams"] == 4
    assert found["decode"]["tokens_per_s"] == {"min": 4, "median": 8, "max": 8}
    assert found["decode_ratio"] == 2
    assert found["per_step"] == COST.as_dict()


def test_what_was_not_measured_is_null(report: Report) -> None:
    found = replace(report, concurrent=None, roofline=None).as_dict()
    assert (found["concurrent"], found["roofline"]) == (None, None)


def test_tables_begin_with_tokens_a_second(report: Report) -> None:
    lines = [line.split() for line in shown(report).splitlines()]
    assert lines[0][0] == "[bold]model:"
    assert ["pp10", "10.00", "10.00", "10.00"] in lines
    assert ["tg5", "2.00", "4.00", "10.00"] in lines
    assert ["tg5,", "4", "streams", "4.00", "8.00", "8.00"] in lines
    assert ["token", "20.00", "9.00", "3.00", "8.00", "3.00", "3", "600", "B", "330", "B"] in lines
    assert ["all", "200", "300", "500", "150", "2.00"] in lines
    assert lines[-5][:2] == ["worker", "0"]
    assert lines[-5][-2:] == ["50", "%"]
    assert "20.0 GB/s" in shown(report)


def test_tables_leave_out_what_was_not_measured(report: Report) -> None:
    overhead, by_action = compare_overheads({"head": [200.0]}, {})
    bare = replace(report, concurrent=None, roofline=None, overhead=overhead, overhead_by_action=by_action)
    assert ["all", "200", "200", "200", "-", "-"] in [line.split() for line in shown(bare).splitlines()]
    text = shown(bare)
    assert "streams" not in text
    assert "GB/s" not in text
    assert "preemptions" not in text


def test_preemptions_are_said_because_they_spoil_the_numbers(report: Report) -> None:
    assert "7 preemptions" in shown(replace(report, preemptions=7))
