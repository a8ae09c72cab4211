from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from coordinator.commands import plan as command
from coordinator.commands.plan import plan
from protos.errors import MeshError, ModelError, TopologyError
from tests import tiny

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(plan, [str(argument) for argument in arguments])


def as_json(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.exception
    assert result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def config_alone(tmp_path: Path, name: str) -> Path:
    shutil.copy(CONFIGS / f"{name}.json", tmp_path / "config.json")
    return tmp_path


def test_headers_are_enough(tmp_path: Path) -> None:
    tiny.make_checkpoint("glm4_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:header])
    with path.open("r+b") as file:  # same size, no weights
        file.truncate(len(data))
    found = as_json("--model", tmp_path, "--shards", 3)
    assert found["headers_checked"]
    assert found["family"] == "glm4_moe"
    assert found["dtype"] == "f32"
    assert [shard["heads"] for shard in found["shards"]] == [[0, 4], [4, 6], [6, 8]]
    assert [shard["expert_columns"] for shard in found["shards"]] == [[0, 64], [64, 160], [160, 256]]
    assert [shard["shared_columns"] for shard in found["shards"]] == [[0, 64], [64, 160], [160, 256]]
    assert [shard["dense_columns"] for shard in found["shards"]] == [[0, 160], [160, 320], [320, 512]]
    assert [shard["vocabulary"] for shard in found["shards"]] == [[0, 170], [170, 341], [341, 512]]
    assert found["total_weight_bytes"] == sum(shard["weight_bytes"] for shard in found["shards"])


@pytest.mark.parametrize(
    ("quantization", "head", "text"),
    [("none", "none", "bf16\n"), ("int8", "int8", "bf16, int8 weights\n"), ("int4", "int8", "bf16, int4 weights (int8 head)\n")],
)
def test_the_head_is_named_where_it_differs(tmp_path: Path, quantization: str, head: str, text: str) -> None:
    arguments = ("--model", config_alone(tmp_path, "olmoe-1b-7b"), "--quantize", quantization)
    found = as_json(*arguments)
    assert (found["quantization"], found["head_quantization"]) == (quantization, head)
    assert text in run(*arguments).stdout


def test_config_is_enough_with_random_weights(tmp_path: Path) -> None:
    found = as_json("--model", config_alone(tmp_path, "intellect-3"), "--shards", 8, "--load-format", "random")
    assert found["parameters"] == 106_852_251_264
    assert found["dtype"] == "bf16"
    assert found["total_kv_bytes_per_token"] == 184 * 1024
    assert not found["headers_checked"]
    assert [shard["expert_columns"][1] - shard["expert_columns"][0] for shard in found["shards"]] == [160, 192] * 4


def test_quantized_plan_is_smaller(tmp_path: Path) -> None:
    model = config_alone(tmp_path, "qwen3-30b-a3b")
    sizes = [
        as_json("--model", model, "--load-format", "random", "--quantize", kind)["total_weight_bytes"]
        for kind in ("none", "int8", "int4")
    ]
    assert sizes[0] > 1.8 * sizes[1] > 1.8 * 1.8 * sizes[2]


def test_dtype_may_be_chosen(tmp_path: Path) -> None:
    model = config_alone(tmp_path, "qwen3-30b-a3b")
    assert as_json("--model", model, "--load-format", "random", "--dtype", "f32")["total_kv_bytes_per_token"] == 192 * 1024


def test_table_shows_who_holds_what(tmp_path: Path) -> None:
    result = run("--model", config_alone(tmp_path, "intellect-3"), "--shards", 8, "--load-format", "random")
    assert result.exit_code == 0, result.exception
    lines = result.stdout.splitlines()
    assert lines[0].endswith("glm4_moe, 106.85 billion parameters, 46 layers, context 131072, bf16")
    assert lines[1].split() == (
        [
            "shard",
            "heads",
            "kv",
            "heads",
            "expert",
            "columns",
            "shared",
            "columns",
            "dense",
            "columns",
            "vocabulary",
            "weights",
            "KV",
            "per",
            "token",
        ]
    )
    assert lines[3].split() == [
        *("1", "12:24", "(12)", "1:2", "(1)", "160:352", "(192)", "160:352", "(192)", "1344:2720", "(1376)"),
        *("18944:37888", "(18944)", "26.85", "GiB", "23", "KiB"),
    ]
    assert lines[10].split()[-2:] == ["184", "KiB"]
    assert lines[-1] == "Planned from config.json alone: no weights were looked at."


def test_model_on_the_hub_is_planned_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_alone(tmp_path, "mixtral-8x7b")
    asked: list[tuple[str, bool]] = []

    def resolve(model: str, *, weights: bool) -> Path:
        asked.append((model, weights))
        return tmp_path

    monkeypatch.setattr(command, "resolve", resolve)
    found = as_json("--model", "mistralai/Mixtral-8x7B-v0.1", "--shards", 4)
    assert asked == [("mistralai/Mixtral-8x7B-v0.1", False)]
    assert found["parameters"] == 46_702_792_704
    assert not found["headers_checked"]


@pytest.mark.parametrize("others", [(), ("pytorch_model.bin", "pytorch_model.bin.index.json"), ("model.gguf",)])
def test_folder_without_safetensors_is_planned_from_its_config(tmp_path: Path, others: tuple[str, ...]) -> None:
    for name in others:
        (tmp_path / name).touch()
    found = as_json("--model", config_alone(tmp_path, "intellect-3"), "--shards", 8)
    assert found["parameters"] == 106_852_251_264
    assert not found["headers_checked"]


def test_folder_with_some_of_its_weights_says_which_are_missing(tmp_path: Path) -> None:
    model = config_alone(tmp_path, "intellect-3")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    result = run("--model", model)
    assert isinstance(result.exception, ModelError)
    assert "model-00001-of-00001.safetensors" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--shards", "0"], TopologyError, "at least 1 shard, found 0"),
        (["--shards", "-2"], TopologyError, "at least 1 shard, found -2"),
        (["--shards", "64"], TopologyError, "at most into 44: use fewer shards"),
    ],
)
def test_mistake_is_an_error_of_ours(tmp_path: Path, arguments: list[str], error: type[MeshError], message: str) -> None:
    model = config_alone(tmp_path, "intellect-3")
    result = run("--model", model, "--load-format", "random", *arguments)
    assert isinstance(result.exception, error)
    with pytest.raises(error, match=message):
        raise result.exception
    assert not result.stdout


def test_missing_model_is_an_error_of_ours(tmp_path: Path) -> None:
    assert isinstance(run("--model", tmp_path / "nothing").exception, ModelError)
    assert isinstance(run("--model", tmp_path).exception, ModelError)


@pytest.mark.parametrize("arguments", [[], ["--model", "x", "--quantize", "int3"], ["--model", "x", "--shards", "two"]])
def test_wrong_flag_exits_with_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2
