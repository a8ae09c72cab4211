"""A step's attention: its tables on the GPU, prepared for all layers, and whether its launches are recorded."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from shardworker.kernels.cuda.attention import HeadKernels, power_of_2, splits_of
from shardworker.kernels.cuda.frame import Frame, num_rows
from shardworker.kernels.cuda.graphs import Input
from shardworker.kernels.cuda.tiles import FEW_ROWS
from shardworker.kernels.rope import Rotation, span_rotation

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from shardworker.kernels.cuda.graphs import Graphs
    from shardworker.kernels.interface import HeadSpec, Span


class Held(NamedTuple):
    """Memory of a step's tables."""

    array: torch.Tensor
    rotation: Rotation | None


class StepMemory:
    """Tables at addresses that recordings know, lent to one step at a time; as many as there are steps open at once."""

    def __init__(self) -> None:
        self._free: dict[Hashable, list[Held]] = {}

    def take(self, key: Hashable) -> Held | None:
        """Some that nobody uses; none: make them anew."""
        free = self._free.get(key)
        return free.pop() if free else None

    def give_back(self, key: Hashable, held: Held) -> None:
        """Let the next step with this key have them. The stream keeps its copies behind this step's reads."""
        self._free.setdefault(key, []).append(held)


@dataclass(frozen=True, slots=True, eq=False)
class CudaStepAttention:
    """See `StepAttention`; launches its kernels."""

    kernels: HeadKernels

    def __call__(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        mean_squares: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Norm, clamp, rotate, write keys and values, attend: [rows, heads * head_dim]."""
        return self.kernels.attend(qkv, qk_norm, mean_squares, keys, values)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class RecordedStepAttention:
    """See `StepAttention`; replays the kernels of an earlier step with the same frame, layer and memory."""

    kernels: HeadKernels
    graphs: Graphs
    held: Held

    def __call__(
        self,
        qkv: torch.Tensor,
        qk_norm: torch.Tensor | None,
        mean_squares: torch.Tensor | None,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """Norm, clamp, rotate, write keys and values, attend: [rows, heads * head_dim]."""
        kernels, room = self.kernels, self.kernels.frame.rows
        key = (
            "attention",
            step_key(kernels),
            self.held.array.data_ptr(),
            0 if qk_norm is None else qk_norm.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            keys.stride(0),
        )
        inputs = [Input(qkv, room)] if mean_squares is None else [Input(qkv, room), Input(mean_squares, room)]

        def compute(qkv: torch.Tensor, mean_squares: torch.Tensor | None = None) -> torch.Tensor:
            return kernels.attend(qkv, qk_norm, mean_squares, keys, values)

        return self.graphs.run(key, inputs, compute)[: qkv.shape[0]]


def step_key(kernels: HeadKernels) -> Hashable:
    """All that decides which kernels are launched with which numbers, addresses apart."""
    heads = kernels.heads
    return (
        kernels.frame,
        kernels.num_splits,
        kernels.page_tokens,
        heads.head_dim,
        heads.kv_head_of,
        heads.scale,
        heads.qk_norm_eps,
        heads.clip_qkv,
        heads.rotary_dims,
        heads.dtype,
    )


def begin_step(
    heads: HeadSpec, spans: Sequence[Span], page_tokens: int, graphs: Graphs | None, memory: StepMemory
) -> CudaStepAttention | RecordedStepAttention:
    """Put the tables of a step on the GPU."""
    frame = Frame.of(spans, heads)
    longest = max((span.position + 1 for span in spans if num_rows(span) == 1), default=1)
    num_splits = splits_of(longest)
    is_recorded = graphs is not None and frame.tiles == 0 and frame.rows <= FEW_ROWS and frame.heads > 0
    if is_recorded:
        frame, num_splits = frame.rounded(power_of_2(frame.rows)), power_of_2(num_splits)
    device = heads.inverse_frequencies.device
    array = frame.fill(spans, heads, page_tokens, device)
    rotation = span_rotation(heads, spans, heads.dtype)
    if graphs is None or not is_recorded:
        array = array.to(device, non_blocking=True)
        return CudaStepAttention(HeadKernels(heads, page_tokens, frame, frame.tables(array), rotation, num_splits))
    key = step_key(HeadKernels(heads, page_tokens, frame, frame.tables(array), rotation, num_splits))
    held = memory.take(key) or _new(frame, array, rotation, device)
    held.array.copy_(array, non_blocking=True)
    if held.rotation is not None and rotation is not None:
        for table, new in zip(held.rotation, rotation, strict=True):
            table[: new.shape[0]].copy_(new)
    kernels = HeadKernels(heads, page_tokens, frame, frame.tables(held.array), held.rotation, num_splits)
    step = RecordedStepAttention(kernels, graphs, held)
    weakref.finalize(step, memory.give_back, key, held)
    return step


def _new(frame: Frame, array: torch.Tensor, rotation: Rotation | None, device: torch.device) -> Held:
    if rotation is None:
        return Held(torch.empty_like(array, device=device), None)
    tables = (table.new_zeros((frame.rows, *table.shape[1:])) for table in rotation)
    return Held(torch.empty_like(array, device=device), Rotation(*tables))
