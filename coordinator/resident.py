"""The small whole weights that stay with the coordinator: embedding rows (memory-mapped), norms, gates."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from coordinator.models.spec import MoeSpec, Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.models.checkpoint import Checkpoint
    from coordinator.models.spec import ModelSpec
    from protos.safetensors_header import TensorEntry

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Embedding(Protocol):
    """Token ids -> hidden rows."""

    def __call__(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Look up f32 [tokens, hidden]."""


@dataclass(frozen=True, slots=True)
class ResidentLayer:
    """What the coordinator needs for one layer; all f32."""

    attention_norm: torch.Tensor
    """[hidden]"""
    feed_forward_norm: torch.Tensor
    """[hidden]"""
    router: torch.Tensor | None = None
    """[experts, hidden]; MoE layers only."""
    correction: torch.Tensor | None = None
    """[experts]; only where the gate has one."""
    shared_router: torch.Tensor | None = None
    """[1, hidden]; only where the shared expert is gated."""


@dataclass(frozen=True, slots=True)
class Resident:
    """The coordinator's own weights."""

    embed: Embedding
    layers: tuple[ResidentLayer, ...]
    final_norm: torch.Tensor


def load_resident(spec: ModelSpec, checkpoint: Checkpoint) -> Resident:
    """Read norms and gates, and map the embedding.

    Raises:
        ModelError: a tensor is missing or its file cannot be read.

    """

    def read(role: Role, layer: int | None = None) -> torch.Tensor:
        entry = checkpoint.tensors[spec.name(role, layer)]
        data = bytearray(checkpoint.read(entry.name))
        return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(entry.shape).float()

    embedding = checkpoint.tensors[spec.name(Role.EMBEDDING)]
    return Resident(
        embed=MappedEmbedding(checkpoint, embedding),
        layers=tuple(_resident_layer(spec, layer, read) for layer in range(spec.num_layers)),
        final_norm=read(Role.FINAL_NORM),
    )


def random_resident(spec: ModelSpec) -> Resident:
    """Draw resident weights at their true shape, for benchmarks: norms are 1, everything else N(0, 0.02)."""
    generator = torch.Generator().manual_seed(0)
    shapes = {Role.SHARED_ROUTER: (1, spec.hidden)}

    def make(role: Role, layer: int | None = None) -> torch.Tensor:
        if role in (Role.ATTENTION_NORM, Role.FEED_FORWARD_NORM, Role.FINAL_NORM):
            return torch.ones(spec.hidden)
        block = spec.feed_forward[layer or 0]
        experts = block.gate.num_experts if isinstance(block, MoeSpec) else 0
        shape = shapes.get(role, (experts,) if role is Role.ROUTER_CORRECTION else (experts, spec.hidden))
        return torch.randn(shape, generator=generator) * 0.02

    table = torch.randn(spec.vocabulary, spec.hidden, generator=generator) * 0.02
    return Resident(
        embed=lambda token_ids: table.index_select(0, torch.tensor(token_ids)),
        layers=tuple(_resident_layer(spec, layer, make) for layer in range(spec.num_layers)),
        final_norm=make(Role.FINAL_NORM),
    )


class _Reader(Protocol):
    def __call__(self, role: Role, layer: int | None = None) -> torch.Tensor: ...


def _resident_layer(spec: ModelSpec, layer: int, read: _Reader) -> ResidentLayer:
    attention_norm, feed_forward_norm = read(Role.ATTENTION_NORM, layer), read(Role.FEED_FORWARD_NORM, layer)
    block = spec.feed_forward[layer]
    if not isinstance(block, MoeSpec):
        return ResidentLayer(attention_norm, feed_forward_norm)
    return ResidentLayer(
        attention_norm,
        feed_forward_norm,
        router=read(Role.ROUTER, layer),
        correction=read(Role.ROUTER_CORRECTION, layer) if block.gate.corrected else None,
        shared_router=read(Role.SHARED_ROUTER, layer) if block.shared_gated else None,
    )


class MappedEmbedding:
    """Embedding rows read from the checkpoint's file where they lie: only the pages of rows in use take memory."""

    def __init__(self, checkpoint: Checkpoint, entry: TensorEntry) -> None:
        """Map the file; the map lives as long as the tensor that looks into it."""
        with (checkpoint.directory / entry.file).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = entry.shape[0] * entry.shape[1]
        self._table = torch.frombuffer(mapped, dtype=_DTYPES[entry.dtype], count=count, offset=entry.offset).view(entry.shape)

    def __call__(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Look up f32 [tokens, hidden]."""
        return self._table.index_select(0, torch.tensor(token_ids)).float()
