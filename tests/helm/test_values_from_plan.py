"""helm/values_from_plan.py: from `coordctl plan --json` to values that the chart takes."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from coordinator.commands.plan import plan
from tests.helm.chart import CHART, ROOT, Rendered, helm, parse, wanted_shards
from tests.tiny import make_checkpoint

MIB = 2**20


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("values_from_plan", ROOT / "helm" / "values_from_plan.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    make_checkpoint("llama", folder)
    return folder


def outline_of(checkpoint: Path, shards: int, quantize: str = "int8") -> dict[str, Any]:
    done = CliRunner().invoke(plan, ["--model", str(checkpoint), f"--shards={shards}", f"--quantize={quantize}", "--json"])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def outline(checkpoint: Path) -> dict[str, Any]:
    return outline_of(checkpoint, 3)


def test_the_chart_takes_what_it_prints(script: ModuleType, outline: dict[str, Any], tmp_path: Path) -> None:
    done = CliRunner().invoke(script.main, ["--kv-tokens", "1048576"], input=json.dumps(outline))
    assert done.exit_code == 0, done.output
    values = tmp_path / "values.yaml"
    values.write_text(done.stdout)
    rendered = Rendered(parse(helm("template", "mesh", str(CHART), "--values", str(values)).stdout))
    assert {"--kv-tokens=1048576", "--quantize=int8", "--dtype=f32"} <= set(rendered.arguments("coordinator"))
    assert wanted_shards(rendered) == 3
    resources = rendered.pod("worker")["containers"][0]["resources"]
    assert (
        resources["requests"]["memory"]
        == resources["limits"]["memory"]
        == yaml.safe_load(done.stdout)["worker"]["resources"]["limits"]["memory"]
    )
    # What was not said stays the chart's own.
    assert resources["requests"]["cpu"] == "250m"


def test_memory_is_that_of_the_largest_slice_its_kv_and_the_program(script: ModuleType, outline: dict[str, Any]) -> None:
    values = script.values_for(outline, 10_000)
    largest = max(shard["weight_bytes"] + 10_000 * shard["kv_bytes_per_token"] for shard in outline["shards"])
    asked = int(values["worker"]["resources"]["limits"]["memory"].removesuffix("Mi")) * MIB
    assert 0 <= asked - (largest + script.WORKER_MIB * MIB) < 64 * MIB
    assert values["allowUneven"] is True


def test_workers_get_room_for_two_plans_at_once(
    script: ModuleType, checkpoint: Path, outline: dict[str, Any], tmp_path: Path
) -> None:
    def asked(*words: str) -> tuple[int, int]:
        done = CliRunner().invoke(script.main, ["--kv-tokens=5000000", *words], input=json.dumps(outline))
        assert done.exit_code == 0, done.output
        values = yaml.safe_load(done.stdout)
        return values["shards"], int(values["worker"]["resources"]["limits"]["memory"].removesuffix("Mi")) * MIB

    two = outline_of(checkpoint, 2)
    (tmp_path / "two.json").write_text(json.dumps(two))
    largest = max(shard["weight_bytes"] + 5_000_000 * shard["kv_bytes_per_token"] for shard in two["shards"])
    (shards, alone), (shards_of_both, both) = asked(), asked(f"--beside={tmp_path / 'two.json'}")
    assert shards == shards_of_both == 3
    assert abs(both - alone - largest) < 64 * MIB < largest


def test_two_plans_of_different_weights_are_refused(
    script: ModuleType, checkpoint: Path, outline: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "plain.json").write_text(json.dumps(outline_of(checkpoint, 2, "none")))
    done = CliRunner().invoke(script.main, ["--beside", str(tmp_path / "plain.json")], input=json.dumps(outline))
    assert done.exit_code != 0
    assert done.stderr == "Error: both plans must have the same model, dtype, quantization: only shards may be others\n"


def test_the_model_is_that_of_the_hub_where_it_is_one(script: ModuleType, outline: dict[str, Any], checkpoint: Path) -> None:
    assert outline["model"] == str(checkpoint)
    assert "hubId" not in script.values_for(outline, 1)["model"]
    for name in ("Qwen/Qwen3-30B-A3B", "owner/a.b_c-d"):
        assert script.values_for({**outline, "model": name}, 1)["model"]["hubId"] == name
    for folder in ("models/a/b", "./model", "model", "-a/b"):
        assert "hubId" not in script.values_for({**outline, "model": folder}, 1)["model"]


def test_a_large_model_gets_longer_to_start(script: ModuleType, outline: dict[str, Any]) -> None:
    chart = yaml.safe_load((CHART / "values.yaml").read_text())["model"]["startupSeconds"]
    assert script.values_for(outline, 1)["model"]["startupSeconds"] == chart == script.LEAST_STARTUP_S
    large = {**outline, "parameters": 30_000_000_000, "dtype": "bf16"}
    assert script.values_for(large, 1)["model"]["startupSeconds"] == 60e9 / script.MODEL_BYTES_PER_S == 1200


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shards": []}', "not JSON"])
def test_what_is_no_plan_is_refused_in_one_line(script: ModuleType, text: str) -> None:
    done = CliRunner().invoke(script.main, input=text)
    assert done.exit_code != 0
    assert done.stderr == "Error: PLAN must be what coordctl plan --json prints\n"
