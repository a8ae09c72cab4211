"""The layer loop: one step through the whole model, readable as its formula.

    hidden = embed(tokens)
    for each layer:
        hidden += sum over shards of attend(norm(hidden))
        hidden += sum over shards of feed_forward(norm(hidden), route(norm(hidden)))
    return norm(hidden) of the rows to sample from

The residual stream stays here in float32; what crosses the wire is normed rows and partials, in the wire's dtype.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from coordinator.microbatches import microbatches
from coordinator.models.spec import MoeSpec
from coordinator.reduce import PartialSum
from coordinator.router import gate_logits, route
from protos import shardworker_pb2, tensor_pb2
from protos.errors import MeshError, WrongResult
from protos.plan_pb2 import QK_NORM_FULL
from protos.shardworker_pb2 import ExecuteRequest
from protos.tensors import encode_into

if TYPE_CHECKING:
    from coordinator.fanout import Fanout
    from coordinator.models.spec import ModelSpec
    from coordinator.resident import Resident, ResidentLayer
    from coordinator.scheduler import Step


class Forward:
    """Steps of one model through one mesh."""

    def __init__(self, spec: ModelSpec, resident: Resident, fanout: Fanout, wire: tensor_pb2.DType) -> None:
        """Bind the model's formula to a mesh."""
        self._spec = spec
        self._resident = resident
        self._fanout = fanout
        self._wire = wire

    async def run(self, step: Step, number: int) -> torch.Tensor:
        """Carry the step's rows through all layers.

        Args:
            step: the rows; their KV is written on the workers.
            number: of the step, rising by `microbatches.LIMIT` within the mesh's sessions.

        Returns:
            f32 [rows to sample from, hidden], normed for the head.

        Raises:
            MeshError: see `Fanout.round` and `PartialSum`.

        """
        parts = microbatches(step)
        if len(parts) == 1:
            return await self._run(step, number)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run(part, number + i)) for i, part in enumerate(parts)]
        except* MeshError as errors:
            raise errors.exceptions[0] from None
        return torch.cat([task.result() for task in tasks])

    async def _run(self, step: Step, number: int) -> torch.Tensor:
        hidden = self._resident.embed(_token_ids(step))  # [rows, hidden]
        for index, layer in enumerate(self._resident.layers):
            request = ExecuteRequest(step=number, batch=_batch(step) if index == 0 else None)
            hidden = hidden + await self._attend(request, index, self._norm(hidden, layer.attention_norm))
            if index == len(self._resident.layers) - 1:
                # The last keys and values are written: of the other rows nothing is needed any more.
                hidden = hidden.index_select(0, torch.tensor(_sampled_rows(step), dtype=torch.long))
            if len(hidden):
                request = ExecuteRequest(step=number)
                hidden = hidden + await self._feed_forward(request, index, self._norm(hidden, layer.feed_forward_norm))
        return self._norm(hidden, self._resident.final_norm)

    async def _attend(self, request: ExecuteRequest, layer: int, normed: torch.Tensor) -> torch.Tensor:
        if self._spec.attention.qk_norm == QK_NORM_FULL:
            request.project.layer = layer
            encode_into(request.project.hidden, normed, self._wire)
            squares = await self._summed(request, "squares", (len(normed), 2))
            request = ExecuteRequest(step=request.step)
            encode_into(request.attend.squares, squares, tensor_pb2.DTYPE_F32)
        else:
            encode_into(request.attend.hidden, normed, self._wire)
        request.attend.layer = layer
        return await self._summed(request, "partial", tuple(normed.shape))

    async def _feed_forward(self, request: ExecuteRequest, layer: int, normed: torch.Tensor) -> torch.Tensor:
        action = request.feed_forward
        action.layer = layer
        block = self._spec.feed_forward[layer]
        if isinstance(block, MoeSpec):
            self._add_route(action, block, self._resident.layers[layer], normed)
        encode_into(action.hidden, normed, self._wire)
        return await self._summed(request, "partial", tuple(normed.shape))

    def _add_route(
        self, action: shardworker_pb2.FeedForward, block: MoeSpec, weights: ResidentLayer, normed: torch.Tensor
    ) -> None:
        if weights.router is None:
            raise ValueError("an MoE layer without a router")
        chosen = route(gate_logits(normed, weights.router), block.gate, weights.correction)
        encode_into(action.experts, chosen.experts, tensor_pb2.DTYPE_I32)
        encode_into(action.expert_weights, chosen.weights, tensor_pb2.DTYPE_F32)
        if weights.shared_router is not None:
            shared = gate_logits(normed, weights.shared_router).sigmoid().squeeze(1)
            encode_into(action.shared_weights, shared, tensor_pb2.DTYPE_F32)

    async def _summed(
        self, request: ExecuteRequest, result: Literal["partial", "squares"], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Sum the shards' answers, each while the next one is under way."""
        total = PartialSum(shape)
        await self._fanout.round(request, result, shape[0], lambda reply: total.add(getattr(reply, result)))
        return total.total()

    def _norm(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm in float32 (Zhang and Sennrich, 2019), as Llama and its descendants use it."""
        # By numpy, a quarter of torch's time for one row: on a core that slept while the workers computed, every operator
        # costs its way through a cold dispatcher.
        rows = hidden.numpy()
        try:
            with np.errstate(over="raise"):
                squares = np.add.reduce(rows * rows, axis=1) / np.float32(self._spec.hidden)
        except FloatingPointError:
            # Beyond about 1e19, which only a worker's mistake explains: the norm would make zeros of such rows.
            raise WrongResult("the partials sum to rows whose squares are beyond what float32 holds") from None
        scale = 1 / np.sqrt(squares + np.float32(self._spec.norm_eps))
        return torch.from_numpy(rows * scale[:, None] * weight.numpy())


def _token_ids(step: Step) -> list[int]:
    ids: list[int] = []
    for rows in step.rows:
        ids += rows.sequence.tokens(rows.position, rows.position + rows.num_rows)
    return ids


def _sampled_rows(step: Step) -> list[int]:
    """Indices of the rows that are the last of their sequence."""
    indices, end = [], 0
    for rows in step.rows:
        end += rows.num_rows
        if rows.samples:
            indices.append(end - 1)
    return indices


def _batch(step: Step) -> shardworker_pb2.Batch:
    return shardworker_pb2.Batch(
        sequences=[
            shardworker_pb2.SequenceRows(
                sequence=rows.sequence.id,
                position=rows.position,
                num_rows=rows.num_rows,
                pages=rows.pages,
                prompt_tokens=len(rows.sequence.request.prompt),
            )
            for rows in step.rows
        ],
        released=step.released,
    )
