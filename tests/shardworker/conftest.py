"""A tiny model built by hand: its checkpoint, its plans for any number of shards, and the whole of it in plain torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from protos import plan_pb2, shardworker_pb2, tensor_pb2
from protos.digest import mesh_digest, shard_digest
from protos.fingerprint import file_fingerprint
from protos.rpc import MAX_WORKER_REPLY_BYTES, MAX_WORKER_REQUEST_BYTES, PROTOCOL_VERSION, channel_options
from protos.shardworker_pb2_grpc import ShardWorkerStub
from protos.tensors import decode, encode
from shardworker.app import RunningWorker, start_worker
from shardworker.executor import Executor
from shardworker.kernels.plain import PlainKernels
from shardworker.loader import load_weights
from shardworker.shard import Shard

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

F32 = tensor_pb2.DTYPE_F32
COORDINATOR = bytes(16)
CPU = torch.device("cpu")


def even(total: int, parts: int, part: int, unit: int = 1) -> tuple[int, int]:
    """Cut as evenly as units allow."""
    units = total // unit
    return units * part // parts * unit, units * (part + 1) // parts * unit


@dataclass
class Tiny:
    """Two layers, the first dense, the second of experts with a shared one; each option is a field."""

    directory: Path
    hidden: int = 64
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 16
    dense: int = 96
    columns: int = 64
    experts: int = 4
    shared: int = 32
    vocabulary: int = 50
    page_tokens: int = 4
    qk_norm: int = plan_pb2.QK_NORM_HEAD
    bias: bool = True
    clip: float = 0.0
    rotary: int = 8
    fused: bool = False
    dtype: int = F32
    quantization: int = plan_pb2.QUANTIZATION_NONE
    file_dtype: torch.dtype = torch.float32
    num_files: int = 2
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        for layer in range(2):
            self._draw_attention(layer)
        self._draw_block("0.dense", self.dense, bias=self.bias)
        self._draw_block("1.shared", self.shared, bias=False)
        if self.fused:
            self._draw("1.experts.gate_up", self.experts, 2 * self.columns, self.hidden)
            self._draw("1.experts.down", self.experts, self.hidden, self.columns)
        else:
            for expert in range(self.experts):
                self._draw_block(f"1.{expert}", self.columns, bias=False)
        self._draw("head", self.vocabulary, self.hidden)
        self.write()

    def _draw(self, name: str, *shape: int, mean: float = 0.0) -> None:
        self.tensors[name] = (torch.randn(shape, generator=self.generator) * 0.2 + mean).to(self.file_dtype)

    def _draw_attention(self, layer: int) -> None:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for role, rows in (("q", q), ("k", kv), ("v", kv)):
            self._draw(f"{layer}.{role}", rows, self.hidden)
            if self.bias:
                self._draw(f"{layer}.{role}_bias", rows)
        self._draw(f"{layer}.o", self.hidden, q)
        if self.bias:
            self._draw(f"{layer}.o_bias", self.hidden)
        if self.qk_norm != plan_pb2.QK_NORM_NONE:
            full = self.qk_norm == plan_pb2.QK_NORM_FULL
            self._draw(f"{layer}.q_norm", q if full else self.head_dim, mean=1)
            self._draw(f"{layer}.k_norm", kv if full else self.head_dim, mean=1)

    def _draw_block(self, prefix: str, width: int, *, bias: bool) -> None:
        for role, shape in (("gate", (width, self.hidden)), ("up", (width, self.hidden)), ("down", (self.hidden, width))):
            self._draw(f"{prefix}.{role}", *shape)
            if bias:
                self._draw(f"{prefix}.{role}_bias", shape[0])

    def write(self) -> None:
        names = list(self.tensors)
        for number in range(self.num_files):
            save_file(
                {name: self.tensors[name] for name in names[number :: self.num_files]}, self.directory / f"{number}.safetensors"
            )

    def files(self) -> list[plan_pb2.CheckpointFile]:
        paths = [self.directory / f"{number}.safetensors" for number in range(self.num_files)]
        return [plan_pb2.CheckpointFile(name=p.name, size=p.stat().st_size, fingerprint=file_fingerprint(p)) for p in paths]

    def cut(self, name: str, *ranges: tuple[int, int] | None, experts: int = 0) -> plan_pb2.TensorSlice:
        shape = self.tensors[name.replace("{expert}", "0")].shape
        spans = [span or (0, size) for span, size in zip(ranges or (None,) * len(shape), shape, strict=True)]
        return plan_pb2.TensorSlice(
            name=name, shape=list(shape), ranges=[plan_pb2.Range(start=a, end=b) for a, b in spans], num_experts=experts
        )

    def spec(self) -> plan_pb2.AttentionSpec:
        frequencies = [10000.0 ** (-2 * i / self.rotary) for i in range(self.rotary // 2)] if self.rotary else []
        rope = plan_pb2.RopeSpec(rotary_dims=self.rotary, inverse_frequencies=frequencies, attention_factor=1.0)
        return plan_pb2.AttentionSpec(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            qk_norm=self.qk_norm,
            qk_norm_eps=1e-5,
            clip_qkv=self.clip,
            rope=rope,
        )

    def plan(self, shard: int = 0, num_shards: int = 1, **changes: Any) -> plan_pb2.ShardPlan:
        heads = even(self.heads, num_shards, shard)
        group = self.heads // self.kv_heads
        kv_heads = (heads[0] // group, -(-heads[1] // group)) if heads[0] < heads[1] else (0, 0)
        vocabulary = even(self.vocabulary, num_shards, shard)
        plan = plan_pb2.ShardPlan(
            shard=shard,
            num_shards=num_shards,
            dtype=self.dtype,
            quantization=self.quantization,
            head_quantization=self.quantization,
            hidden=self.hidden,
            attention=self.spec(),
            heads=plan_pb2.Range(start=heads[0], end=heads[1]),
            kv_heads=plan_pb2.Range(start=kv_heads[0], end=kv_heads[1]),
            layers=[self._layer(layer, shard, num_shards, heads, kv_heads) for layer in range(2)],
            head=self.cut("head", vocabulary, None),
            vocabulary=plan_pb2.Range(start=vocabulary[0], end=vocabulary[1]),
            files=self.files(),
            page_tokens=self.page_tokens,
        )
        plan.MergeFrom(plan_pb2.ShardPlan(**changes))
        if plan.random_weights:
            del plan.files[:]
        return plan

    def _layer(
        self, layer: int, shard: int, num_shards: int, heads: tuple[int, int], kv_heads: tuple[int, int]
    ) -> plan_pb2.LayerPlan:
        q, kv = ((a * self.head_dim, b * self.head_dim) for a, b in (heads, kv_heads))
        parts = {f"{r}{s}": self.cut(f"{layer}.{r}{s}", span, *([None] if not s else []))
                 for r, span in (("q", q), ("k", kv), ("v", kv)) for s in ("", *(["_bias"] if self.bias else []))}  # fmt: skip
        parts["o"] = self.cut(f"{layer}.o", None, q)
        if self.bias and shard == 0:
            parts["o_bias"] = self.cut(f"{layer}.o_bias")
        if self.qk_norm != plan_pb2.QK_NORM_NONE:
            full = self.qk_norm == plan_pb2.QK_NORM_FULL
            parts["q_norm"] = self.cut(f"{layer}.q_norm", q if full else None)
            parts["k_norm"] = self.cut(f"{layer}.k_norm", kv if full else None)
        attention = plan_pb2.AttentionSlice(**parts)
        if layer == 0:
            return plan_pb2.LayerPlan(attention=attention, dense=self._block("0.dense", self.dense, shard, num_shards))
        start, end = even(self.columns, num_shards, shard, 32)
        if self.fused:
            width = self.columns
            gate, up = (self.cut("1.experts.gate_up", None, (start + o, end + o), None) for o in (0, width))
            down = self.cut("1.experts.down", None, None, (start, end))
        else:
            gate, up = (self.cut(f"1.{{expert}}.{r}", (start, end), None, experts=self.experts) for r in ("gate", "up"))
            down = self.cut("1.{expert}.down", None, (start, end), experts=self.experts)
        shared = self._block("1.shared", self.shared, shard, num_shards)
        experts = plan_pb2.ExpertsSlice(num_experts=self.experts, gate=gate, up=up, down=down, shared=shared)
        return plan_pb2.LayerPlan(attention=attention, experts=experts)

    def _block(self, prefix: str, width: int, shard: int, num_shards: int) -> plan_pb2.FeedForwardSlice:
        span = even(width, num_shards, shard, 32)
        part = plan_pb2.FeedForwardSlice(
            gate=self.cut(f"{prefix}.gate", span, None),
            up=self.cut(f"{prefix}.up", span, None),
            down=self.cut(f"{prefix}.down", None, span),
        )
        if f"{prefix}.gate_bias" in self.tensors:
            part.gate_bias.CopyFrom(self.cut(f"{prefix}.gate_bias", span))
            part.up_bias.CopyFrom(self.cut(f"{prefix}.up_bias", span))
            if shard == 0:
                part.down_bias.CopyFrom(self.cut(f"{prefix}.down_bias"))
        return part

    # The whole model, unsharded, in plain torch.

    def weight(self, name: str) -> torch.Tensor | None:
        found = self.tensors.get(name)
        return None if found is None else found.float()

    def attend(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """One sequence from position 0, [rows, hidden]."""
        rows = x.shape[0]
        q, k, v = (functional.linear(x, self.weight(f"{layer}.{r}"), self.weight(f"{layer}.{r}_bias")) for r in "qkv")
        if self.qk_norm == plan_pb2.QK_NORM_FULL:
            q, k = self._norm(q, f"{layer}.q_norm"), self._norm(k, f"{layer}.k_norm")
        q, k, v = (t.view(rows, -1, self.head_dim) for t in (q, k, v))
        if self.qk_norm == plan_pb2.QK_NORM_HEAD:
            q, k = self._norm(q, f"{layer}.q_norm"), self._norm(k, f"{layer}.k_norm")
        if self.clip:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k = self._rotate(q), self._rotate(k)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.head_dim**-0.5
        scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), float("-inf"))
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(rows, -1)
        return functional.linear(mixed, self.weight(f"{layer}.o"), self.weight(f"{layer}.o_bias"))

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight(name)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        if not self.rotary:
            return x
        half = self.rotary // 2
        angles = torch.arange(x.shape[0]).float()[:, None] * torch.tensor(self.spec().rope.inverse_frequencies)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b, rest = x[..., :half], x[..., half : self.rotary], x[..., self.rotary :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)

    def feed_forward(
        self, layer: int, x: torch.Tensor, chosen: torch.Tensor | None, weights: torch.Tensor | None
    ) -> torch.Tensor:
        if layer == 0:
            return self._gated(x, "0.dense")
        assert chosen is not None
        assert weights is not None
        out = self._gated(x, "1.shared")
        for row in range(x.shape[0]):
            for expert, weight in zip(chosen[row].tolist(), weights[row].tolist(), strict=True):
                gate, up, down = self._expert(expert)
                out[row] += weight * ((functional.silu(x[row] @ gate.T) * (x[row] @ up.T)) @ down.T)
        return out

    def _expert(self, expert: int) -> tuple[torch.Tensor, ...]:
        if self.fused:
            gate, up = self.tensors["1.experts.gate_up"][expert].float().chunk(2)
            return gate, up, self.tensors["1.experts.down"][expert].float()
        return tuple(self.tensors[f"1.{expert}.{role}"].float() for role in ("gate", "up", "down"))

    def _gated(self, x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate = functional.linear(x, self.weight(f"{prefix}.gate"), self.weight(f"{prefix}.gate_bias"))
        up = functional.linear(x, self.weight(f"{prefix}.up"), self.weight(f"{prefix}.up_bias"))
        return functional.linear(functional.silu(gate) * up, self.weight(f"{prefix}.down"), self.weight(f"{prefix}.down_bias"))

    # Ways to a worker.

    def shard(self, plan: plan_pb2.ShardPlan) -> Shard:
        """Load in this process."""
        kernels = PlainKernels(CPU)
        weights, num_bytes = load_weights(plan, str(self.directory), kernels, lambda _: None, lambda: False)
        return Shard(plan, weights, num_bytes, kernels)

    def load_request(self, plans: list[plan_pb2.ShardPlan] | None = None, shard: int = 0, assignment: int = 1) -> Any:
        plans = plans or [self.plan()]
        return shardworker_pb2.LoadRequest(
            protocol_version=PROTOCOL_VERSION,
            plan=plans[shard],
            shard_digests=[shard_digest(plan) for plan in plans],
            assignment=assignment,
            directory=str(self.directory),
        )


class Rounds:
    """Requests of one session, numbered and fenced."""

    def __init__(self, digest: bytes, epoch: int = 1, coordinator: bytes = COORDINATOR) -> None:
        self.digest = digest
        self.epoch = epoch
        self.coordinator = coordinator
        self.round = 0

    def request(self, step: int = 0, **action: Any) -> shardworker_pb2.ExecuteRequest:
        self.round += 1
        return shardworker_pb2.ExecuteRequest(plan_digest=self.digest, epoch=self.epoch, step=step, round=self.round, **action)

    def open(self, num_pages: int = 16) -> shardworker_pb2.ExecuteRequest:
        action = shardworker_pb2.Open(protocol_version=PROTOCOL_VERSION, num_pages=num_pages, coordinator=self.coordinator)
        return self.request(open=action)

    def attend(self, step: int, layer: int, hidden: torch.Tensor, batch: Any = None) -> shardworker_pb2.ExecuteRequest:
        extra = {} if batch is None else {"batch": batch}
        return self.request(step, attend=shardworker_pb2.Attend(layer=layer, hidden=encode(hidden, F32)), **extra)


class Talk:
    """One Execute stream."""

    def __init__(self, stub: ShardWorkerStub, rounds: Rounds) -> None:
        self.call = stub.Execute()
        self.rounds = rounds

    async def ask(self, request: shardworker_pb2.ExecuteRequest) -> shardworker_pb2.ExecuteResponse:
        await self.call.write(request)
        response = await self.call.read()
        assert response is not grpc.aio.EOF, await self.call.code()
        assert (response.step, response.round) == (request.step, request.round)
        return response

    async def open(self, num_pages: int = 16) -> shardworker_pb2.ExecuteResponse:
        return await self.ask(self.rounds.open(num_pages))

    async def attend(self, step: int, layer: int, hidden: torch.Tensor, batch: Any = None) -> shardworker_pb2.ExecuteResponse:
        return await self.ask(self.rounds.attend(step, layer, hidden, batch))

    async def step(self, number: int, batch: Any, rows: int = 1) -> list[shardworker_pb2.ExecuteResponse]:
        """Attend in both layers."""
        hidden = torch.ones(rows, 64)
        return [await self.attend(number, layer, hidden, batch if layer == 0 else None) for layer in range(2)]


class Client:
    """A channel to one worker."""

    def __init__(self, channel: grpc.aio.Channel, tiny: Tiny, worker: RunningWorker) -> None:
        self.channel = channel
        self.worker = worker
        self.holding = worker._holding
        self.stub = ShardWorkerStub(channel)
        self.tiny = tiny

    async def load(self, request: Any = None) -> list[shardworker_pb2.LoadResponse]:
        return [response async for response in self.stub.Load(request or self.tiny.load_request())]

    async def describe(self) -> shardworker_pb2.DescribeResponse:
        return await self.stub.Describe(shardworker_pb2.DescribeRequest())

    def talk(self, epoch: int = 1, coordinator: bytes = COORDINATOR, plan: plan_pb2.ShardPlan | None = None) -> Talk:
        digest = mesh_digest([shard_digest(plan or self.tiny.plan())])
        return Talk(self.stub, Rounds(digest, epoch, coordinator))


def batch(*sequences: tuple[int, int, int, list[int]], released: tuple[int, ...] = ()) -> shardworker_pb2.Batch:
    """Rows of (sequence, position, num_rows, pages)."""
    rows = [
        shardworker_pb2.SequenceRows(sequence=s, position=p, num_rows=n, pages=pages, prompt_tokens=1)
        for s, p, n, pages in sequences
    ]
    return shardworker_pb2.Batch(sequences=rows, released=released)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_batch() -> Callable[..., shardworker_pb2.Batch]:
    return batch


@pytest.fixture
def make_tiny(tmp_path: Path) -> Callable[..., Tiny]:
    def make(**options: Any) -> Tiny:
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        return Tiny(directory, **options)

    return make


@pytest.fixture
def tiny(make_tiny: Callable[..., Tiny]) -> Tiny:
    return make_tiny()


@pytest.fixture
async def client(tmp_path: Path, tiny: Tiny) -> AsyncIterator[Client]:
    worker = await start_worker(f"unix:{tmp_path}/w.sock", device="cpu", threads=1)
    options = channel_options(max_send_bytes=MAX_WORKER_REQUEST_BYTES, max_receive_bytes=MAX_WORKER_REPLY_BYTES)
    async with grpc.aio.insecure_channel(worker.address, options=options) as channel:
        yield Client(channel, tiny, worker)
    await worker.stop(0)


@pytest.fixture
def make_rounds() -> type[Rounds]:
    return Rounds


@pytest.fixture
def tensor_of() -> Callable[[tensor_pb2.Tensor], torch.Tensor]:
    return decode


@pytest.fixture
def executor() -> Any:
    one = Executor(CPU, 1)
    yield one
    assert one.close(5)
