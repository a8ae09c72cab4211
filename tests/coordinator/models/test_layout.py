from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from coordinator.models.checkpoint import Checkpoint
from coordinator.models.config import read_config
from coordinator.models.layout import check_tensors, has_own_head, match_layout
from coordinator.models.registry import describe
from coordinator.models.spec import Role
from protos.errors import ModelError
from tests import tiny

if TYPE_CHECKING:
    from coordinator.models.spec import ModelSpec

NAMES = "model.safetensors"


def open_model(directory: Path) -> tuple[ModelSpec, Checkpoint]:
    checkpoint = Checkpoint.open(directory)
    return match_layout(describe(read_config(directory)), checkpoint.tensors), checkpoint


def change(directory: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    found = load_file(directory / NAMES)
    for name, tensor in tensors.items():
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, directory / NAMES)


@pytest.mark.parametrize("name", list(tiny.CASES))
def test_every_tiny_checkpoint_is_whole(name: str, tmp_path: Path) -> None:
    tiny.make_checkpoint(name, tmp_path)
    spec, checkpoint = open_model(tmp_path)
    check_tensors(spec, checkpoint)
    assert (Role.FUSED_GATE_UP in spec.names) == name.endswith("_fused")


def test_fused_mixtral_has_its_router_elsewhere(tmp_path: Path) -> None:
    tiny.make_checkpoint("mixtral_fused", tmp_path)
    spec, _ = open_model(tmp_path)
    assert spec.name(Role.ROUTER, 0) == "model.layers.0.mlp.gate.weight"
    assert match_layout(spec, ()) is spec


def test_missing_tensors_are_counted_and_the_first_named(tmp_path: Path) -> None:
    tiny.make_checkpoint("qwen3_moe", tmp_path)
    change(tmp_path, {"model.layers.1.mlp.experts.7.up_proj.weight": None})
    with pytest.raises(ModelError) as error:
        check_tensors(*open_model(tmp_path))
    assert str(error.value) == (
        f"{tmp_path} has no tensor 'model.layers.1.mlp.experts.7.up_proj.weight': it is not a whole qwen3_moe model"
    )
    change(tmp_path, {"model.norm.weight": None, "model.layers.0.mlp.gate.weight": None})
    with pytest.raises(ModelError, match=r"no tensor 'model\.layers\.0\.mlp\.gate\.weight', nor 2 others that it needs:"):
        check_tensors(*open_model(tmp_path))


def test_untied_model_without_head_is_not_whole(tmp_path: Path) -> None:
    tiny.make_checkpoint("llama", tmp_path)
    change(tmp_path, {"lm_head.weight": None})
    with pytest.raises(ModelError, match=r"has no tensor 'lm_head\.weight'"):
        check_tensors(*open_model(tmp_path))


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    tiny.make_checkpoint("llama", tmp_path)
    change(tmp_path, {"model.layers.2.self_attn.k_proj.weight": torch.ones(32, 128)})
    with pytest.raises(
        ModelError, match=r"k_proj\.weight' must have the shape \[64, 128\], as config\.json says, found \[32, 128\]"
    ):
        check_tensors(*open_model(tmp_path))


def test_config_of_another_model_is_caught(tmp_path: Path) -> None:
    tiny.make_checkpoint("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 500}))
    with pytest.raises(ModelError, match=r"embed_tokens\.weight' must have the shape \[500, 128\]"):
        check_tensors(*open_model(tmp_path))


@pytest.mark.parametrize(("dtype", "found"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.float64, "F64")])
def test_wrong_dtype_is_named(tmp_path: Path, dtype: torch.dtype, found: str) -> None:
    tiny.make_checkpoint("llama", tmp_path)
    change(tmp_path, {"model.layers.0.mlp.down_proj.weight": torch.ones(128, 512).to(dtype)})
    with pytest.raises(ModelError, match=rf"down_proj\.weight' has dtype {found}, supported are F32, BF16, F16"):
        check_tensors(*open_model(tmp_path))


def test_tied_head_is_the_embedding_unless_there_is_another(tmp_path: Path) -> None:
    tiny.make_checkpoint("llama_tied", tmp_path)
    spec, checkpoint = open_model(tmp_path)
    assert not has_own_head(spec, checkpoint.tensors)
    assert not has_own_head(spec, None)
    # transformers 5 does not tie what differs.
    other = torch.randn(tiny.VOCABULARY, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    change(tmp_path, {"lm_head.weight": other})
    spec, checkpoint = open_model(tmp_path)
    assert has_own_head(spec, checkpoint.tensors)
    assert torch.equal(tiny.oracle(tmp_path).get_output_embeddings().weight, other)
