"""`coordctl bench` and `coordctl profile`: mistakes before anything starts, and one small run of each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coordinator.commands import bench as bench_module
from coordinator.commands import profile as profile_module
from coordinator.commands.bench import bench
from coordinator.commands.profile import profile
from protos.errors import InvalidArgument
from tests.tiny import make_checkpoint

DEADLINE_S = 120


@pytest.fixture(scope="module")
def config_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json and nothing else."""
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint("qwen3_moe", folder)
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    return folder


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The folder that the programs take for temporary files, empty again afterwards; sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="shardmesh-test-") as folder:
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


def start(temporary: Path, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "coordinator", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=DEADLINE_S)
    return process.returncode, output, errors


def test_a_benchmark_of_random_weights_needs_only_a_config(config_alone: Path, temporary: Path) -> None:
    work = ("--prompt-tokens", 7, "--new-tokens", 4, "--concurrency", 2, "--repeats", 1, "--json")
    mesh = ("--model", config_alone, "--load-format", "random", "--shards", 2, "--threads", 1, "--device", "cpu")
    code, output, errors = finish(start(temporary, "bench", *mesh, *work))
    assert (code, errors) == (0, "")
    found: dict[str, Any] = json.loads(output)
    for rates in (found["prefill"], found["decode"], found["concurrent"]["decode"], found["concurrent"]["total"]):
        assert 0 < rates["tokens_per_s"]["min"] <= rates["tokens_per_s"]["median"] <= rates["tokens_per_s"]["max"]
    token = found["per_token"]
    assert token["rounds"] == 3 * 2 + 1
    assert 0 < token["compute_ms"] + token["wire_ms"] < token["total_ms"]
    assert set(found["round"]["actions"]) == {"attend", "feed_forward", "head"}
    assert found["round"]["overhead_us"]["median"] > 0
    assert found["roofline"]["bytes_per_s"] > 1e8
    assert 0 < found["roofline"]["fraction"] < 1
    assert len(found["workers"]) == 2
    assert all(0 < worker["slice_bytes"] < worker["peak_rss_bytes"] for worker in found["workers"])
    assert found["preemptions"] == 0


def test_given_workers_are_measured_without_an_echo_and_stay(config_alone: Path, temporary: Path) -> None:
    sockets = [temporary / f"{name}.sock" for name in ("a", "b")]
    serve = (
        sys.executable,
        "-m",
        "shardworker",
        "serve",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--log-level",
        "error",
        "--listen",
    )
    workers = [subprocess.Popen([*serve, f"unix:{socket}"], stdout=subprocess.PIPE, text=True) for socket in sockets]
    try:
        for worker in workers:
            assert worker.stdout
            assert worker.stdout.readline().startswith("listening on ")
        mesh = ("--model", config_alone, "--load-format", "random", "--workers", ",".join(f"unix:{socket}" for socket in sockets))
        work = ("--prompt-tokens", 5, "--new-tokens", 3, "--repeats", 1, "--json")
        code, output, errors = finish(start(temporary, "bench", *mesh, *work))
        assert (code, errors) == (0, "")
        found: dict[str, Any] = json.loads(output)
        assert (found["shards"], found["threads"], found["roofline"]) == (2, 1, None)
        assert found["round"]["overhead_us"]["median"] > 0
        assert (found["round"]["echo_overhead_us"], found["round"]["ratio"]) == (None, None)
        assert all(worker.poll() is None for worker in workers)
    finally:
        for worker in workers:
            worker.terminate()
            worker.communicate(timeout=DEADLINE_S)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--workers", "h:1", "--insecure", "--shards", "1"), "--shards cannot be chosen with --workers"),
        (("--workers", "h:1", "--insecure", "--threads", "1", "--device", "cpu"), "--threads, --device cannot be chosen"),
        (("--workers", "h:1"), "say --insecure"),
        (("--workers", "h:1,h:1", "--insecure"), "addresses, each once"),
        (("--workers", " , "), "addresses, each once"),
        (("--workers", "h", "--insecure"), "neither HOST:PORT"),
        (("--workers", "h", "--tls", "t"), "neither HOST:PORT"),
        (("--tls", "t"), "--tls is for workers that run already: give --workers too"),
    ],
)
def test_given_workers_are_what_they_are(flags: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "run", lambda _: pytest.fail("it went on to run"))
    result = CliRunner().invoke(bench, ["--model", "m", *flags])
    assert isinstance(result.exception, InvalidArgument)
    assert text in str(result.exception)


def test_a_profile_is_a_trace(config_alone: Path, temporary: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    mesh = ("--model", config_alone, "--load-format", "random", "--threads", 1, "--device", "cpu")
    code, output, errors = finish(start(temporary, "profile", *mesh, "--output", path, "--tokens", 3, "--prompt-tokens", 5))
    assert (code, errors) == (0, "")
    assert output.startswith(f"{path}: 21 rounds of 3 steps")
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(event["name"].startswith("step ") for event in events) == 3
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"coordinator", "wire", "worker 0"}


def test_ctrl_c_ends_everything(config_alone: Path, temporary: Path) -> None:
    mesh = ("--model", config_alone, "--load-format", "random", "--threads", 1, "--device", "cpu")
    process = start(temporary, "bench", *mesh, "--prompt-tokens", 9, "--new-tokens", 400, "--json")
    # The echo's servers come last; then the work begins.
    while not list(temporary.glob("*/echo-0.sock")):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, "", "")


def test_a_missing_model_is_one_line(temporary: Path, tmp_path: Path) -> None:
    code, output, errors = finish(start(temporary, "bench", "--model", tmp_path / "missing"))
    assert (code, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("coordctl: ")
    assert str(tmp_path / "missing") in line


def test_a_prompt_beyond_the_context_is_refused_before_loading(config_alone: Path, temporary: Path) -> None:
    work = ("--prompt-tokens", 500, "--new-tokens", 13)
    code, _, errors = finish(start(temporary, "bench", "--model", config_alone, "--load-format", "random", *work))
    assert code == 2
    assert errors == ("coordctl: prompt (500) and max_tokens (13) are 513 tokens together, the model's context holds 512\n")


@pytest.mark.parametrize(
    "flags",
    [
        ("--shards", "0"),
        ("--threads", "0"),
        ("--prompt-tokens", "0"),
        ("--new-tokens", "1"),
        ("--concurrency", "65"),
        ("--concurrency", "0"),
        ("--repeats", "0"),
        ("--quantize", "int3"),
        ("--wire", "f16"),
        ("--kv-tokens", "0"),
        ("--coordinator", "host:1"),
    ],
)
def test_a_wrong_flag_of_bench_is_named(flags: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "run", lambda _: pytest.fail("it went on to run"))
    result = CliRunner().invoke(bench, ["--model", "m", *flags])
    assert result.exit_code == 2
    assert flags[0] in result.stderr


@pytest.mark.parametrize("output", [".", "missing/trace.json"])
def test_a_trace_needs_a_file_that_can_be_written(tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_module, "run", lambda _: pytest.fail("it went on to run"))
    result = CliRunner().invoke(profile, ["--model", "m", "--output", str(tmp_path / output)])
    assert isinstance(result.exception, InvalidArgument)
    assert "--output" in str(result.exception)


@pytest.mark.parametrize("flags", [(), ("--output",), ("--output", "x", "--tokens", "0"), ("--output", "x", "--json")])
def test_a_wrong_flag_of_profile_exits_with_2(flags: tuple[str, ...]) -> None:
    assert CliRunner().invoke(profile, ["--model", "m", *flags]).exit_code == 2


def test_model_is_needed() -> None:
    result = CliRunner().invoke(bench, [])
    assert result.exit_code == 2
    assert "--model" in result.stderr
