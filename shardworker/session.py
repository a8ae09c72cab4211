"""One coordinator's rounds: their order, what each may bring, and the arithmetic that answers it.

A round that is refused has changed nothing. Only attention has a state: a step is open from its first round until its last
layer attended. At most two are open, so that a coordinator may overlap them; a third ends the older one. One job of the
device runs at a time (`shardworker.executor`).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from protos import shardworker_pb2 as pb
from protos import tensor_pb2
from protos.errors import InvalidArgument, MeshError, PlanMismatch, StepMismatch
from protos.rpc import MAX_CANDIDATES, MAX_WORKER_REPLY_BYTES
from protos.tensors import encode
from shardworker.kernels.interface import Span
from shardworker.kv import KvPool
from shardworker.operands import any_rows, checked_tensor, hidden_rows, routing_of
from shardworker.plan import length
from shardworker.tables import PageTables, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardworker.kernels.interface import StepAttention
    from shardworker.shard import Shard

MAX_OPEN_STEPS = 2
REPLY_HEADER_BYTES = 1024
"""More than a response takes besides its tensor."""


class Phase(enum.Enum):
    """The round that a step waits for in its layer."""

    PROJECT = "project"
    ATTEND = "attend"


@dataclass(slots=True)
class Step:
    """A forward step whose layers attend one after the other."""

    number: int
    batch: pb.Batch
    attention: StepAttention
    num_rows: int
    phase: Phase
    layer: int = 0
    qkv: torch.Tensor | None = None
    """Between `project` and `attend`."""
    dtype: tensor_pb2.DType = tensor_pb2.DTYPE_F32
    """Of the hidden rows that `project` brought."""


class Session:
    """Sequences, KV pages and open steps of one Execute stream."""

    def __init__(self, shard: Shard, num_pages: int, uncommitted_bytes: int) -> None:
        """Reserve KV memory.

        Raises:
            InvalidArgument: more pages than can be numbered.
            OutOfMemory: it cannot be had.

        """
        self._kv: KvPool | None = KvPool(shard.plan, num_pages, shard.device, uncommitted_bytes)
        self._shard: Shard | None = shard
        self._tables = PageTables(num_pages, shard.plan.page_tokens)
        self._steps: dict[int, Step] = {}
        self._last_step = 0

    @property
    def kv_bytes(self) -> int:
        """KV memory reserved."""
        return self._kv.num_bytes if self._kv else 0

    @property
    def uncommitted_bytes(self) -> int:
        """KV memory reserved and not touched yet."""
        return self._kv.uncommitted_bytes if self._kv else 0

    def drop(self) -> None:
        """Let go of weights and KV memory; every further round is refused."""
        self._shard = None
        self._kv = None
        self._steps.clear()

    def execute(self, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
        """Answer one round, `open` excepted.

        Raises:
            MeshError: the round is refused and nothing was done.

        """
        shard, kv = self._shard, self._kv
        if shard is None or kv is None:
            raise PlanMismatch("the plan of this session was dropped: load it, then open another stream")
        shard.wake()
        try:
            return self._dispatch(shard, kv, request)
        except MeshError:
            raise
        except Exception:
            # Halfway through: whatever was written lies beyond the committed tokens.
            self._steps.pop(request.step, None)
            raise
        finally:
            shard.rest()

    def _dispatch(self, shard: Shard, kv: KvPool, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
        action = request.WhichOneof("action")
        if action == "feed_forward":
            return _feed_forward(shard, request.feed_forward)
        if action == "attend":
            return self._attend(shard, kv, request)
        if action == "project":
            return self._project(shard, kv, request)
        if action == "head":
            return _head(shard, request.head)
        raise InvalidArgument(f"wanted project, attend, feed_forward or head, found {action or 'no action'}")

    def _project(self, shard: Shard, kv: KvPool, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
        action = request.project
        step = self._expect(shard, request, Phase.PROJECT, action.layer)
        hidden = hidden_rows(shard, action.hidden, _num_rows(request, step))
        step = step or self._begin(shard, kv, request)
        step.qkv = shard.project(action.layer, hidden)
        step.dtype = action.hidden.dtype
        step.phase = Phase.ATTEND
        return pb.ExecuteResponse(squares=encode(shard.squares(step.qkv), tensor_pb2.DTYPE_F32))

    def _attend(self, shard: Shard, kv: KvPool, request: pb.ExecuteRequest) -> pb.ExecuteResponse:
        action = request.attend
        step = self._expect(shard, request, Phase.ATTEND, action.layer)
        if action.HasField("hidden") == shard.full_norm or action.HasField("squares") != shard.full_norm:
            raise InvalidArgument("attend brings `squares` after `project` (norms over all heads), and `hidden` otherwise")
        if step is not None and step.qkv is not None:
            qkv, dtype = step.qkv, step.dtype
            squares = checked_tensor(action.squares, "squares", tensor_pb2.DTYPE_F32, (step.num_rows, 2)).to(shard.device)
        else:
            hidden, dtype, squares = hidden_rows(shard, action.hidden, _num_rows(request, step)), action.hidden.dtype, None
            step = step or self._begin(shard, kv, request)
            qkv = shard.project(action.layer, hidden)
        partial = shard.attend(action.layer, qkv, squares, step.attention, kv)
        response = pb.ExecuteResponse(partial=encode(partial, dtype))
        step.qkv = None
        step.phase = _first_phase(shard)
        step.layer += 1
        if step.layer == shard.num_layers:
            self._tables.commit(step.batch.sequences)
            del self._steps[step.number]
        return response

    def _expect(self, shard: Shard, request: pb.ExecuteRequest, phase: Phase, layer: int) -> Step | None:
        """Find the open step that waits for this very round; none where the round may begin a step."""
        step = self._steps.get(request.step)
        if request.HasField("batch"):
            if request.step <= self._last_step:
                raise StepMismatch(f"wanted a step above {self._last_step}, found {request.step}")
            if layer != 0 or phase is not _first_phase(shard):
                first = _first_phase(shard).value
                raise StepMismatch(f"a batch comes with layer 0's {first}, found layer {layer}'s {phase.value}")
            return None
        if step is None:
            raise StepMismatch(f"step {request.step} is not open (open: {sorted(self._steps)}): begin it anew with its batch")
        if (step.layer, step.phase) != (layer, phase):
            raise StepMismatch(
                f"step {request.step}: wanted layer {step.layer}'s {step.phase.value}, found layer {layer}'s {phase.value}"
            )
        return step

    def _begin(self, shard: Shard, kv: KvPool, request: pb.ExecuteRequest) -> Step:
        batch = request.batch
        self._tables.check(batch)
        # Nothing below refuses the batch.
        self._give_up_steps(batch)
        tables = self._tables.begin(batch)
        for rows in batch.sequences:
            kv.touch(rows.pages)
        own = pb.Batch()
        own.CopyFrom(batch)
        num_rows = sum(rows.num_rows for rows in batch.sequences)
        step = Step(request.step, own, shard.begin(_spans(batch.sequences, tables)), num_rows, _first_phase(shard))
        self._steps[request.step] = step
        self._last_step = request.step
        return step

    def _give_up_steps(self, batch: pb.Batch) -> None:
        """Close steps whose sequences begin again here, and the older one of two others."""
        touched = {rows.sequence for rows in batch.sequences} | set(batch.released)
        for number, step in list(self._steps.items()):
            if any(rows.sequence in touched for rows in step.batch.sequences):
                del self._steps[number]
        while len(self._steps) >= MAX_OPEN_STEPS:
            del self._steps[min(self._steps)]


def _spans(sequences: Sequence[pb.SequenceRows], tables: Sequence[Table]) -> list[Span]:
    spans: list[Span] = []
    first = 0
    for rows, table in zip(sequences, tables, strict=True):
        part = slice(first, first + rows.num_rows)
        spans.append(Span(part, rows.position, rows.prompt_tokens, tuple(table.pages), table.contiguous))
        first += rows.num_rows
    return spans


def _first_phase(shard: Shard) -> Phase:
    return Phase.PROJECT if shard.full_norm else Phase.ATTEND


def _num_rows(request: pb.ExecuteRequest, step: Step | None) -> int:
    return step.num_rows if step is not None else sum(rows.num_rows for rows in request.batch.sequences)


def _feed_forward(shard: Shard, action: pb.FeedForward) -> pb.ExecuteResponse:
    if action.layer >= shard.num_layers:
        raise InvalidArgument(f"feed_forward: layer {action.layer} of {shard.num_layers}")
    hidden = any_rows(shard, action.hidden)
    partial = shard.feed_forward(action.layer, hidden, routing_of(shard, action, hidden.shape[0]))
    return pb.ExecuteResponse(partial=encode(partial, action.hidden.dtype))


def _head(shard: Shard, action: pb.Head) -> pb.ExecuteResponse:
    hidden = any_rows(shard, action.hidden)
    rows = hidden.shape[0]
    f32 = tensor_pb2.DTYPE_F32
    if action.logits:
        num_bytes = rows * length(shard.plan.vocabulary) * torch.float32.itemsize
        if num_bytes > MAX_WORKER_REPLY_BYTES - REPLY_HEADER_BYTES:
            raise InvalidArgument(f"logits take {num_bytes} bytes (rows: {rows}), over the limit of a reply: ask for fewer rows")
        return pb.ExecuteResponse(head=pb.HeadResult(logits=encode(shard.logits(hidden), f32)))
    if not 1 <= action.num_candidates <= MAX_CANDIDATES:
        raise InvalidArgument(f"num_candidates: wanted 1 to {MAX_CANDIDATES}, found {action.num_candidates}")
    if len(action.temperatures) != rows or not all(0 < temperature < math.inf for temperature in action.temperatures):
        raise InvalidArgument(f"temperatures: wanted one above 0 for each row ({rows}), found {action.temperatures[:8]}")
    temperatures = torch.tensor(action.temperatures, dtype=torch.float64)
    found = shard.candidates(hidden, action.num_candidates, temperatures)
    result = pb.HeadResult(
        candidates=encode(found.ids, tensor_pb2.DTYPE_I32),
        logits=encode(found.logits, f32),
        logsumexp=encode(found.logsumexp, tensor_pb2.DTYPE_F64),
    )
    return pb.ExecuteResponse(head=result)
