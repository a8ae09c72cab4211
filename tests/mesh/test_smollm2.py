"""A real chat model, dense and upcycled to experts, against transformers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from protos import generation_pb2
from tests.mesh.conftest import Completed, Mesh, MeshMaker
from tests.smollm2 import SMOLLM2, needs_smollm2

pytestmark = needs_smollm2

QUESTIONS = (
    "What is the capital of France?",
    "Name three colours, and say of each what it reminds you of.",
    "Schreibe einen Satz über die Stadt Zürich. 🙂",
)
NEW_TOKENS = 40
NUM_EXPERTS = 4


@pytest.fixture(scope="module")
def answers() -> list[list[int]]:
    """Token ids of transformers' greedy answers, end-of-sequence token included."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    result = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        tokens = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        result.append(tokens[0, ids["input_ids"].shape[1] :].tolist())
    return result


async def _ask(running: Mesh, question: str) -> Completed:
    chat = generation_pb2.Chat(messages=[generation_pb2.ChatMessage(role="user", content=question)])
    result = Completed()
    async for response in running.client.generate(generation_pb2.GenerateRequest(chat=chat, max_tokens=NEW_TOKENS)):
        result.add(response)
    return result


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
async def test_chat_answers_are_transformers(mesh: MeshMaker, answers: list[list[int]], shards: int) -> None:
    async with mesh(SMOLLM2, shards) as running:
        results = await asyncio.gather(*(_ask(running, question) for question in QUESTIONS))
    assert [result.tokens for result in results] == answers
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    assert [result.text for result in results] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    assert "Paris" in results[0].text
    assert results[0].finished is not None
    assert results[0].finished.reason == generation_pb2.FINISH_REASON_STOP


async def test_identical_experts_answer_as_the_dense_model(mesh: MeshMaker, answers: list[list[int]], tmp_path: Path) -> None:
    directory = tmp_path / "upcycled"
    _upcycle(directory)
    async with mesh(directory, 2) as running:
        results = await asyncio.gather(*(_ask(running, question) for question in QUESTIONS))
        family = (await running.client.model()).family
    assert family == "mixtral"
    assert [result.tokens for result in results] == answers


def _upcycle(directory: Path) -> None:
    """Make a Mixtral of SmolLM2 whose four experts are copies of its feed-forward block, with any router.

    The top two weights sum to 1, so that the routed sum is the dense block's result (sparse upcycling, Komatsuzaki et al., 2022).
    """
    directory.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).write_bytes((SMOLLM2 / name).read_bytes())
    config = json.loads((SMOLLM2 / "config.json").read_text())
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    }
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(SMOLLM2 / "model.safetensors", "pt") as source:
        for name in source.keys():  # noqa: SIM118  # not a dict
            prefix, block, rest = name.partition(".mlp.")
            if not block:
                tensors[name] = source.get_tensor(name)
                continue
            expert_name = {"gate_proj.weight": "w1", "up_proj.weight": "w3", "down_proj.weight": "w2"}[rest]
            for expert in range(NUM_EXPERTS):
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.{expert_name}.weight"] = source.get_tensor(name).clone()
            router = torch.randn(NUM_EXPERTS, config["hidden_size"], generator=generator)
            tensors[f"{prefix}.block_sparse_moe.gate.weight"] = router
    save_file(tensors, directory / "model.safetensors")
