"""What right means: every family, at every shard count, gives the reference's tokens and logits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from coordinator.models.config import read_config
from coordinator.models.registry import describe
from shardworker.kernels.choose import choose_kernels
from shardworker.kernels.interface import Kernels
from shardworker.kernels.plain import PlainKernels
from tests.mesh.conftest import MeshMaker
from tests.tiny import CASES, make_checkpoint, oracle

SHARDS = (1, 2, 3, 4, 8)
NEW_TOKENS = 48
TOP = 20
FASTEST, TORCH = choose_kernels(torch.device("cpu"), 1), PlainKernels(torch.device("cpu"))
MARGIN = 1e-3
"""Between the best two logits of the oracle: far above float32 noise, or a difference would prove nothing."""


@dataclass(frozen=True)
class Expected:
    prompt: list[int]
    tokens: list[int]
    logprobs: torch.Tensor
    """Of the last step, [vocabulary]."""


def _name(value: object) -> str:
    return str(getattr(value, "name", value))


def _expect(directory: Path) -> list[Expected]:
    model = oracle(directory)
    spec = describe(read_config(directory))
    lengths = (1, 2, 3, 17, 64, min(200, spec.context - NEW_TOKENS))
    generator = torch.Generator().manual_seed(5)
    return [_decided(model, length, spec.vocabulary, generator) for length in lengths]


def _decided(model: PreTrainedModel, length: int, vocabulary: int, generator: torch.Generator) -> Expected:
    """Draw prompts until the oracle is nowhere torn between two tokens."""
    for _ in range(30):
        prompt = torch.randint(3, vocabulary, (length,), generator=generator)
        result = model.generate(
            prompt[None],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(result.logits).float()  # [steps, vocabulary]
        best = logits.topk(2, dim=-1).values
        if float((best[:, 0] - best[:, 1]).min()) > MARGIN:
            return Expected(prompt.tolist(), result.sequences[0, length:].tolist(), logits[-1].log_softmax(-1))
    raise AssertionError("the oracle is undecided about every prompt: the checkpoint's weights are no good")


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Expected]]:
    directory = tmp_path_factory.mktemp(request.param) / "model"
    make_checkpoint(request.param, directory)
    return directory, _expect(directory)


@pytest.mark.parametrize(("shards", "kernels"), [*((shards, FASTEST) for shards in SHARDS), (2, TORCH)], ids=_name)
async def test_tokens_and_logits_are_the_references(
    mesh: MeshMaker, case: tuple[Path, list[Expected]], shards: int, kernels: Kernels
) -> None:
    directory, expected = case
    async with mesh(directory, shards, kernels=kernels) as running:
        results = await asyncio.gather(*(running.generate(one.prompt, NEW_TOKENS, logprobs=TOP) for one in expected))
    for one, result in zip(expected, results, strict=True):
        assert result.tokens == one.tokens, f"prompt of {len(one.prompt)} tokens"
        found = {entry.token_id: entry.logprob for entry in result.logprobs[-1].top}
        wanted = one.logprobs[list(found)]
        assert len(found) == TOP
        assert torch.allclose(torch.tensor(list(found.values())), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama_odd", "qwen3_moe_odd", "glm4_moe", "olmoe"])
async def test_five_workers_by_the_same_arithmetic(mesh: MeshMaker, tmp_path: Path, name: str) -> None:
    directory = tmp_path / "model"
    make_checkpoint(name, directory)
    expected = _expect(directory)[3:5]
    async with mesh(directory, 5) as running:
        results = await asyncio.gather(*(running.generate(one.prompt, NEW_TOKENS) for one in expected))
    assert [result.tokens for result in results] == [one.tokens for one in expected]
