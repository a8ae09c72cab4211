"""The table beside peers: the random GGUF, what each round runs, how runs become rows, and children that misbehave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from bench.peer_child import measure
from bench.peers import System, as_dict, list_systems, main, markdown, run_child
from bench.random_gguf import STD, write_gguf

CONFIG = {
    "hidden_size": 256,
    "vocab_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
}
FLAGS: dict[str, Any] = {
    "model": Path("a-model"),
    "python": "other-python",
    "llama_threads": "2,1",
    "meshes": "1x2,4x1",
    "transformers": False,
    "prompt_tokens": 16,
    "new_tokens": 8,
    "repeats": 2,
    "rounds": 2,
}


def run(prefill: float, decode: float, **more: object) -> dict[str, Any]:
    """What a child says, as far as the table reads it."""
    spreads = {name: {"min": value - 1, "median": value, "max": value + 1} for name, value in (("p", prefill), ("d", decode))}
    return {"prefill": {"tokens_per_s": spreads["p"]}, "decode": {"tokens_per_s": spreads["d"]}, **more}


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_gguf_holds_every_tensor_of_a_qwen3_moe(tmp_path: Path) -> None:
    write_gguf(CONFIG, tmp_path / "random.gguf")
    reader = gguf.GGUFReader(tmp_path / "random.gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 2)
    assert reader.fields["general.architecture"].contents() == "qwen3moe"
    assert len(reader.tensors) == 3 + 2 * 12
    assert all(names.get_name(tensor.name.removesuffix(".weight")) for tensor in reader.tensors)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down_exps.weight"] == [32, 256, 4]


def test_gguf_weights_have_the_standard_deviation_of_a_fresh_model(tmp_path: Path) -> None:
    write_gguf(CONFIG, tmp_path / "random.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "random.gguf").tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("norm.weight"):
            assert np.all(values == 1)
        else:
            assert values.std() == pytest.approx(STD, rel=0.1), tensor.name
            assert abs(values.mean()) < STD / 10


def test_every_system_gets_the_same_lengths() -> None:
    systems = list_systems(Path("weights.gguf"), {**FLAGS, "transformers": True})
    assert [system.name for system in systems] == [
        "llama.cpp Q4_0, 2 threads",
        "llama.cpp Q4_0, 1 thread",
        "shardmesh int4, 1 x 2",
        "shardmesh int4, 4 x 1",
        "transformers bf16, 2 threads",
    ]
    assert all({"--prompt-tokens=16", "--new-tokens=8", "--repeats=2"} <= set(system.command) for system in systems)
    assert systems[0].command[0] == "other-python"


@pytest.mark.parametrize("wrong", [{"meshes": "1x2x3"}, {"meshes": "two"}, {"llama_threads": ""}])
def test_lists_that_are_none_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(click.BadParameter, match="must look like"):
        list_systems(Path("weights.gguf"), {**FLAGS, **wrong})


def test_ratios_are_of_medians_to_the_first_system() -> None:
    machine = {"cpu": "CPU", "cores": 2, "shardmesh": "1", "torch": "2"}
    runs = {
        System("peer", ()): [run(100, 10, peer={"peer": "3"}), run(300, 30, peer={"peer": "3"})],
        System("ours", ()): [run(400, 25, machine=machine), run(400, 35, machine=machine)],
    }
    found = as_dict(runs, FLAGS)
    assert found["rows"][1]["prefill"] == {"min": 399, "median": 400, "max": 401, "ratio": 2}
    assert found["rows"][1]["decode"] == {"min": 24, "median": 30, "max": 36, "ratio": 1.5}
    table = markdown(json.loads(json.dumps(found)))
    assert "| ours | 400 [399-401] | 2.00 | 30.0 [24.0-36.0] | 1.50 |" in table
    assert "peer 3." in table


def test_an_interpreter_without_llama_cpp_is_named_in_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path), "--python", "/nowhere/python"])
    assert result.exit_code == 1
    assert result.output.startswith("Error: /nowhere/python cannot import llama_cpp")
    assert result.output.count("\n") == 1


def test_a_child_past_its_time_is_killed() -> None:
    with pytest.raises(click.ClickException, match=r"not done after 0\.5 s"):
        run_child(python("import time; time.sleep(60)"), 0.5)


def test_a_child_that_dies_is_no_result() -> None:
    with pytest.raises(click.ClickException, match="killed by SIGSEGV"):
        run_child(python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), 30)
    with pytest.raises(SystemExit):
        run_child(python("raise SystemExit(3)"), 30)


class CountingPeer:
    """Answers at once, and remembers what it was asked."""

    vocabulary = 8

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []

    def clear(self) -> None:
        self.lengths.append([])

    def evaluate(self, ids: list[int]) -> None:
        self.lengths[-1].append(len(ids))

    def best(self) -> int:
        return 1

    def describe(self) -> dict[str, str]:
        return {}


def test_a_repeat_is_a_prompt_and_all_tokens_but_its_first() -> None:
    peer = CountingPeer()
    found = measure(peer, prompt_tokens=16, new_tokens=4, repeats=2)
    assert peer.lengths == 3 * [[16, 1, 1, 1]]
    assert found["decode"]["tokens_per_s"]["min"] > 0
