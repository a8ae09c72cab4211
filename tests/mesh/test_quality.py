"""What quantization costs: the mean log likelihood of fixed texts under a real model, through a real mesh.

`pytest -rP tests/mesh/test_quality.py` shows the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from coordinator import forward
from coordinator.config import ModelSettings
from coordinator.fanout import Fanout
from coordinator.forward import Forward
from coordinator.request import Request
from coordinator.scheduler import Rows, Step
from coordinator.sequence import Sequence, SequenceId
from coordinator.served_model import ServedModel
from coordinator.workers.pool import WorkerPool
from protos import rpc
from protos.shardworker_pb2 import ExecuteRequest, Head
from protos.tensor_pb2 import DTYPE_F32
from protos.tensors import decode, encode
from shardworker.app import start_worker
from tests.smollm2 import SMOLLM2, needs_smollm2

pytestmark = needs_smollm2

TEXTS = tuple(sorted((Path(__file__).parent.parent / "data" / "texts").glob("*.txt")))
PAGE_TOKENS = 16
HEAD_ROWS = 64
Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0

Likelihoods = dict[str, float]
"""Mean log likelihood of a token, nats, by the text's name."""


@pytest.fixture(scope="module")
def texts() -> dict[str, list[int]]:
    """Token ids by the text's name."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    return {path.stem: tokenizer(path.read_text())["input_ids"] for path in TEXTS}


@pytest.fixture(scope="module")
def expected(texts: dict[str, list[int]]) -> dict[str, Likelihoods]:
    """Of transformers: the weights as they are, and those that int4 quantizes rounded by the gguf package, the head to Q8_0."""
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    # The head is the embedding, which stays whole.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    whole = _transformers_likelihoods(model, texts)
    for name, tensor in model.named_parameters():
        if "_proj.weight" in name or "lm_head" in name:
            tensor.data.copy_(_rounded(tensor.data, Q8_0 if "lm_head" in name else Q4_0))
    return {"whole": whole, "q4_0": _transformers_likelihoods(model, texts)}


def _rounded(weight: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    return torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind).reshape(weight.shape).copy())


def _transformers_likelihoods(model: Callable[..., object], texts: dict[str, list[int]]) -> Likelihoods:
    with torch.inference_mode():
        return {name: _likelihood(model(torch.tensor([ids])).logits[0, :-1], ids) for name, ids in texts.items()}  # type: ignore[attr-defined]


def _likelihood(logits: torch.Tensor, ids: list[int]) -> float:
    """Mean log probability of the tokens after the first; `logits` is [tokens - 1, vocabulary]."""
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:]).unsqueeze(-1)).double().mean())


async def _mesh_likelihoods(sockets: Path, texts: dict[str, list[int]], quantization: str) -> Likelihoods:
    """All tokens of a text go in as one prompt; `Forward` hands every row to the head (`_every_row_samples`)."""
    model = ServedModel.open(ModelSettings(str(SMOLLM2), dtype="f32", wire="f32", quantization=quantization))
    worker = await start_worker(f"unix:{sockets}/worker", device="cpu", threads=1)
    pool = WorkerPool((worker.address,))
    try:
        num_pages = sum(-(-len(ids) // PAGE_TOKENS) for ids in texts.values())
        fanout = await pool.assemble(model.plan(1, PAGE_TOKENS), model.directory, num_pages, lambda _: None)
        layers = Forward(model.spec, model.resident(), fanout, DTYPE_F32)
        found: Likelihoods = {}
        first_page = 0
        for number, (name, ids) in enumerate(texts.items(), 1):
            pages = tuple(range(first_page, first_page + -(-len(ids) // PAGE_TOKENS)))
            first_page += len(pages)
            sequence = Sequence(SequenceId(number), Request(name, tuple(ids), 1))
            hidden = await layers.run(Step((Rows(sequence, 0, len(ids), pages, samples=True),), ()), number)
            assert len(hidden) == len(ids)
            logits = torch.cat([await _logits(fanout, rows, number) for rows in hidden[:-1].split(HEAD_ROWS)])
            found[name] = _likelihood(logits, ids)
        fanout.close()
        return found
    finally:
        await pool.close()
        await worker.stop(0)


async def _logits(fanout: Fanout, hidden: torch.Tensor, step: int) -> torch.Tensor:
    assert len(hidden) * 49152 * 4 < rpc.MAX_WORKER_REPLY_BYTES
    request = ExecuteRequest(step=step, head=Head(hidden=encode(hidden, DTYPE_F32), logits=True))
    (reply,) = await fanout.round(request, "head", len(hidden))
    return decode(reply.head.logits)


@pytest.fixture(autouse=True)
def _every_row_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_sampled_rows", lambda step: list(range(step.num_rows)))


@pytest.mark.parametrize(("quantization", "bound"), [("none", 1e-5), ("int8", 0.005), ("int4", 0.2)])
async def test_the_drop_in_likelihood_is_bounded_and_not_above_q4_0s(
    tmp_path: Path, texts: dict[str, list[int]], expected: dict[str, Likelihoods], quantization: str, bound: float
) -> None:
    found = await _mesh_likelihoods(tmp_path, texts, quantization)
    for name, likelihood in found.items():
        whole, theirs = expected["whole"][name], expected["q4_0"][name]
        drop = (likelihood - whole) / whole
        print(  # noqa: T201  # the figures are what the test is for
            f"{quantization}, {name}, {len(texts[name])} tokens: {likelihood:.4f} nats a token, {drop:.3%} below float32's "
            f"{whole:.4f} (Q4_0: {theirs:.4f}, {(theirs - whole) / whole:.3%} below)"
        )
        assert drop < bound, name
    assert _total(found, texts) >= _total(expected["q4_0"], texts)


def _total(likelihoods: Likelihoods, texts: dict[str, list[int]]) -> float:
    """Log likelihood of all texts, nats."""
    return sum(likelihood * (len(texts[name]) - 1) for name, likelihood in likelihoods.items())
