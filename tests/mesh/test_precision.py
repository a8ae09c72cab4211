"""Smaller weights and smaller messages: the log probabilities stay near the float32 reference's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from safetensors.torch import load_file, save_file

from tests.mesh.conftest import MeshMaker
from tests.tiny import oracle

# No gate is so near a tie that rounding decides which experts are chosen.
PROMPT = [77, 12, 401, 3, 9]
TOP = 20


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("qwen3_moe_kv2")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    """Log probabilities of the token after the prompt, [vocabulary]."""
    with torch.inference_mode():
        return oracle(checkpoint)(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)


# The bounds are about three times what the formats lose on these wild weights; float32's own loss is 1e-5.
@pytest.mark.parametrize(
    ("dtype", "wire", "bound"),
    [("f32", "f32", 1e-4), ("f32", "bf16", 0.3), ("f32", "int8", 1.0), ("bf16", "bf16", 0.3), ("f16", "f32", 0.1)],
)
async def test_log_probabilities_stay_near_the_reference(  # noqa: PLR0917  # fixtures and parameters
    mesh: MeshMaker, checkpoint: Path, expected: torch.Tensor, dtype: str, wire: str, bound: float
) -> None:
    async with mesh(checkpoint, 2, dtype=dtype, wire=wire) as running:
        top = (await running.generate(PROMPT, 1, logprobs=TOP)).logprobs[0].top
    found = torch.tensor([entry.logprob for entry in top])
    assert float((found - expected[[entry.token_id for entry in top]]).abs().max()) < bound


@pytest.mark.parametrize(("quantization", "grid"), [("int8", GGMLQuantizationType.Q8_0), ("int4", GGMLQuantizationType.Q4_0)])
@pytest.mark.parametrize("shards", [1, 3])
async def test_weights_that_lie_on_the_grid_lose_nothing(  # noqa: PLR0917  # fixtures and parameters
    mesh: MeshMaker, checkpoint: Path, tmp_path: Path, quantization: str, grid: GGMLQuantizationType, shards: int
) -> None:
    _round_weights(checkpoint, tmp_path / "rounded", grid)
    async with mesh(tmp_path / "rounded", shards, quantization=quantization) as running:
        found = await running.generate(PROMPT, 24)
    reference = oracle(tmp_path / "rounded").generate(
        torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert found.tokens == reference[0, len(PROMPT) :].tolist()


def _round_weights(source: Path, target: Path, grid: GGMLQuantizationType) -> None:
    """Write the checkpoint with what a worker quantizes rounded by the gguf package: matrices to `grid`, the head to Q8_0."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj.weight" in name or name == "lm_head.weight":
            kind = grid if "_proj.weight" in name else GGMLQuantizationType.Q8_0
            rounded = dequantize(quantize(tensor.numpy(), kind), kind)
            tensors[name] = torch.from_numpy(rounded.reshape(tensor.shape).copy())
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
