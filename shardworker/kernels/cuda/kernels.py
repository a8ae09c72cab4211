"""`Kernels` on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from shardworker.kernels.cuda.attention import power_of_2
from shardworker.kernels.cuda.experts import route_frame, routed_experts, rows_at_once
from shardworker.kernels.cuda.graphs import CudaRecorder, Graphs, Input
from shardworker.kernels.cuda.step import StepMemory, begin_step
from shardworker.kernels.cuda.tiles import FEW_ROWS
from shardworker.kernels.cuda.weights import CudaDenseWeight, CudaGroupedWeight, stored
from shardworker.kernels.experts import feed_forward
from shardworker.kernels.plain import BITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.plan_pb2 import Quantization
    from shardworker.kernels.cuda.graphs import Recorder
    from shardworker.kernels.cuda.routes import RouteFrame
    from shardworker.kernels.cuda.weights import CudaWeight
    from shardworker.kernels.interface import HeadSpec, Span, StepAttention, Weight


class CudaKernels:
    """Triton kernels, with cuBLAS for dense weights and many rows.

    A row of a step that only decodes, up to `FEW_ROWS` rows of it, has the same bits whatever rows are beside it: tiles and
    splits of sums depend on weights and on the row's own text. A prompt's rows do not (other tiles, cuBLAS), so as a whole
    this is not batch-invariant.
    """

    name = "triton"

    def __init__(self, device: torch.device, recorder: Recorder | None = None) -> None:
        """Launch nothing yet.

        Args:
            device: a GPU; under Triton's interpreter also the CPU.
            recorder: of decoding rounds; by default CUDA graphs on a GPU, and none elsewhere.

        """
        self.device = device
        if recorder is None and device.type == "cuda":
            recorder = CudaRecorder(device)
        self._graphs = None if recorder is None else Graphs(recorder, device)
        self._memory = StepMemory()

    def wake(self) -> None:
        """Nothing to do: what is launched is queued on the GPU."""

    def rest(self) -> None:
        """Nothing to do."""

    def empty_weight(
        self, shape: tuple[int, ...], quantization: Quantization, dtype: torch.dtype, device: torch.device
    ) -> Weight:
        """Take the memory of a weight."""
        if bits := BITS.get(quantization):
            return CudaGroupedWeight.empty(shape, bits, dtype, device)
        return CudaDenseWeight.empty(shape, dtype, device)

    def begin(self, heads: HeadSpec, spans: Sequence[Span], page_tokens: int) -> StepAttention:
        """Prepare the attention of a step."""
        return begin_step(heads, spans, page_tokens, self._graphs, self._memory)

    def feed_forward(
        self,
        x: torch.Tensor,
        gate_up: Weight,
        down: Weight,
        gate_up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden]."""
        return feed_forward(x, gate_up, down, gate_up_bias, down_bias)

    def experts(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: Weight, down: Weight
    ) -> torch.Tensor:
        """Weighted sum of each row's experts, float32 [rows, hidden]."""
        rows, hidden = x.shape
        if down.num_inputs == 0 or rows == 0:
            return torch.zeros((rows, hidden), dtype=torch.float32, device=x.device)
        x, matrices = x.contiguous(), (cast("CudaWeight", gate_up), cast("CudaWeight", down))
        num_experts, k = stored(matrices[1])[0].shape[0], chosen.shape[1]
        if self._graphs is not None and rows <= FEW_ROWS:
            return self._recorded(self._graphs, x, (chosen, weights), route_frame(power_of_2(rows), k, num_experts), matrices)
        parts = []
        most = rows_at_once(k, hidden)
        for start in range(0, rows, most):
            part = slice(start, min(start + most, rows))
            frame = route_frame(part.stop - start, k, num_experts)
            array = frame.fill(chosen[part], weights[part], self.device).to(self.device, non_blocking=True)
            parts.append(routed_experts(x[part], array, frame, *matrices))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _recorded(
        self,
        graphs: Graphs,
        x: torch.Tensor,
        routing: tuple[torch.Tensor, torch.Tensor],
        frame: RouteFrame,
        matrices: tuple[CudaWeight, CudaWeight],
    ) -> torch.Tensor:
        addresses = tuple((*(part.data_ptr() for part in stored(weight)[:2]), stored(weight)[2]) for weight in matrices)
        array = frame.fill(*routing, self.device)

        def compute(x: torch.Tensor, array: torch.Tensor) -> torch.Tensor:
            return routed_experts(x, array, frame, *matrices)

        key = ("experts", frame, matrices[1].num_inputs, addresses)
        return graphs.run(key, [Input(x, frame.rows), Input(array, array.shape[0])], compute)[: x.shape[0]]
