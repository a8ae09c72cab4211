"""Meshes over networks: which cases are run, the table, and one small mesh over a real network with delay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import bench.network as network_module
from bench.model import Network as Link
from bench.model import decode_work
from bench.namespaces import ROOT, Network, missing
from bench.network import Case, Run, address, choose_cases, main, markdown, meshes, predict, read_mesh
from tests.tiny import make_checkpoint

RTT_S = 0.005
PROMPT = "5,17,300,42"
NEW_TOKENS = 12
DEADLINE_S = 120


def test_baselines_are_run_first_and_nothing_twice() -> None:
    flags = {"workers": "1,2,4", "wires": "f32,bf16", "rtts_ms": "0,5", "rates_mbit": "0,100"}
    cases = choose_cases(flags)
    assert cases[:3] == [Case(size, "bf16", 0, 0) for size in (1, 2, 4)]
    assert len(cases) == len(set(cases))
    assert cases[3:] == [
        *(Case(size, "bf16", 5, 0) for size in (1, 2, 4)),
        Case(2, "f32", 0, 0),
        Case(2, "f32", 0, 100),
        Case(2, "bf16", 0, 100),
    ]


def test_no_delays_and_no_rates_leave_the_baselines() -> None:
    flags = {"workers": "2", "wires": "bf16", "rtts_ms": "", "rates_mbit": ""}
    assert choose_cases(flags) == [Case(2, "bf16", 0, 0)]


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network_module, "missing", lambda: "network namespaces need root")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["model"])
    assert result.exit_code == 1
    assert "network namespaces need root" in str(result.exception)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint("qwen3_moe", directory)
    return directory


def report(model: Path, token_ms: float) -> dict[str, Any]:
    """What `coordctl bench` says of two workers, all but 1 ms of each token being rounds."""
    return {
        "model": str(model),
        "dtype": "f32",
        "quantization": "none",
        "wire": "bf16",
        "shards": 2,
        "prompt_tokens": 8,
        "new_tokens": 4,
        "prefill": {"tokens_per_s": {"median": 4000 / token_ms}},
        "decode": {"tokens_per_s": {"median": 1000 / token_ms}},
        "per_token": {
            "compute_ms": 1,
            "wire_ms": token_ms - 2,
            "coordinator_ms": 1,
            "rounds": 7,
            "bytes_sent": 7 * 2 * 400,
            "bytes_received": 7 * 2 * 400,
        },
        "per_prompt": {
            "compute_ms": 2,
            "wire_ms": token_ms,
            "coordinator_ms": token_ms - 2,
            "rounds": 7,
            "bytes_sent": 7 * 2 * 2400,
            "bytes_received": 7 * 2 * 2400,
        },
        "machine": {"cpu": "CPU", "cores": 2},
    }


def test_the_table_has_what_was_measured_beside_what_is_said(model: Path) -> None:
    runs = [Run(Case(2, "bf16", 0, 0), 1e-4, report(model, 10.0)), Run(Case(2, "bf16", 5, 0), 5.1e-3, report(model, 50.0))]
    lines = markdown(runs).splitlines()
    assert lines[2].startswith("| 2 | bf16 | 0.10 ms | - | 10.0 ms | 10.1 ms | +1 % | 20.0 ms |")
    assert lines[3].startswith("| 2 | bf16 | 5.10 ms | - | 50.0 ms | 45.1 ms | -10 % |")
    assert {line.count("|") for line in lines[:4]} == {11}


def test_a_rate_adds_the_time_of_the_bytes(model: Path) -> None:
    baseline = [Run(Case(2, "bf16", 0, 0), 1e-4, report(model, 10.0))]
    token_s, _ = predict(Case(2, "bf16", 0, 8), 1e-4, baseline)
    work = decode_work(read_mesh(baseline[0].report, "bf16"), 1, 8, 4)
    assert token_s == pytest.approx(10e-3 + (work.bytes + work.bytes / 2) / 1e6, rel=0.01)


def generate(command: list[str], *arguments: str) -> dict[str, Any]:
    """One greedy completion, by the mesh that the command names."""
    work = ["--prompt-ids", PROMPT, "--max-tokens", str(NEW_TOKENS), "--ignore-eos", "--temperature", "0", "--json"]
    found = subprocess.run(
        [*command, *arguments, *work], capture_output=True, text=True, check=False, timeout=DEADLINE_S, cwd=ROOT
    )
    assert found.returncode == 0, found.stderr
    return dict(json.loads(found.stdout))


def serving(network: Network, model: Path, socket: Path) -> subprocess.Popen[str]:
    """Start a coordinator in node 0, which its callers reach by a socket file, and wait until it serves."""
    command = [sys.executable, "-m", "coordinator", "serve", "--model", str(model), "--listen", f"unix:{socket}", "--insecure"]
    command += [
        "--workers",
        f"{address(1)},{address(2)}",
        "--shards",
        "2",
        "--dtype",
        "f32",
        "--wire",
        "f32",
        "--log-level",
        "error",
    ]
    process = subprocess.Popen(network.inside(0, command), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    assert process.stdout.readline().startswith("serving ")
    return process


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_a_slow_network_changes_no_token_and_costs_a_round_trip_a_round(model: Path, tmp_path: Path) -> None:
    found: dict[float, dict[str, Any]] = {}
    with meshes(2) as network:
        for rtt_s in (0.0, RTT_S):
            network.shape(rtt_s, None)
            process = serving(network, model, tmp_path / "socket")
            try:
                command = [sys.executable, "-m", "coordinator", "generate", "--coordinator", f"unix:{tmp_path}/socket"]
                # The first one warms everything up.
                for _ in range(2):
                    found[rtt_s] = generate(command)
            finally:
                process.terminate()
                process.communicate(timeout=DEADLINE_S)
    here = generate([sys.executable, "-m", "coordinator", "generate"], "--model", str(model), "--shards", "1", "--dtype", "f32")
    assert found[0.0]["token_ids"] == found[RTT_S]["token_ids"] == here["token_ids"]
    near_s, far_s = (found[rtt_s]["timings"]["decode_s"] / (NEW_TOKENS - 1) for rtt_s in (0.0, RTT_S))
    # What the formula adds is exact in rounds; what the machine adds while it waits is not in it.
    mesh = read_mesh({"model": str(model), "shards": 2, "dtype": "f32", "quantization": "none", "wire": "f32"}, "f32")
    token = decode_work(mesh, 1, 4, NEW_TOKENS)
    assert token.rounds == 7
    from_network_s = token.rounds * Link(RTT_S).rtt_s
    assert from_network_s * 0.95 < far_s < 2 * (near_s + from_network_s)
