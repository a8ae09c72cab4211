"""What spans say: OpenTelemetry's attributes for generative AI where it has one, `shardmesh.` before all others.

Times are seconds. `shardmesh.slowest` is the worker whose answer came last: its compute, queue and wire are the whole round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from coordinator.tally import phase_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.request import Request
    from coordinator.rounds import Round
    from coordinator.scheduler import Step

Attributes = Mapping[str, str | int | float]

OPERATION = "text_completion"
"""Which of the operations known for generative AI a request is: token ids become more of them, a chat too."""

_S = 1e9


def request_attributes(request: Request) -> Attributes:
    """Say what was asked for, without the prompt."""
    sampling = request.sampling
    return {
        "gen_ai.response.id": request.request_id,
        "gen_ai.usage.input_tokens": len(request.prompt),
        "gen_ai.request.max_tokens": request.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
    }


def step_attributes(step: Step, number: int, rounds: Sequence[Round]) -> Attributes:
    """Say what a step did, and what its rounds cost together.

    Args:
        step: the rows of all requests.
        number: of the step.
        rounds: that were answered.

    """
    slowest = [(one, one.answers[last_shard(one)]) for one in rounds]
    compute_ns = sum(answer.compute_ns for _, answer in slowest)
    queue_ns = sum(answer.queue_ns for _, answer in slowest)
    whole_ns = sum(answer.received_ns - one.started_ns for one, answer in slowest)
    return {
        "shardmesh.step": number,
        "shardmesh.phase": phase_of(step).value,
        "shardmesh.step.requests": len(step.rows),
        "shardmesh.step.rows": step.num_rows,
        "shardmesh.rounds": len(rounds),
        "shardmesh.request_bytes": sum(one.request_bytes for one in rounds),
        "shardmesh.response_bytes": sum(answer.num_bytes for one in rounds for answer in one.answers),
        "shardmesh.slowest.compute_seconds": compute_ns / _S,
        "shardmesh.slowest.queue_seconds": queue_ns / _S,
        "shardmesh.slowest.wire_seconds": (whole_ns - compute_ns - queue_ns) / _S,
    }


def round_attributes(one: Round) -> Attributes:
    """Say what a round did, and for whom it waited."""
    shard = last_shard(one)
    answer = one.answers[shard]
    wire_ns = answer.received_ns - one.started_ns - answer.compute_ns - answer.queue_ns
    layer = {} if one.layer is None else {"shardmesh.layer": one.layer}
    return layer | {
        "shardmesh.step": one.step,
        "shardmesh.rows": one.num_rows,
        "shardmesh.request_bytes": one.request_bytes,
        "shardmesh.response_bytes": sum(answer.num_bytes for answer in one.answers),
        "shardmesh.slowest.shard": shard,
        "shardmesh.slowest.worker": one.workers[shard],
        "shardmesh.slowest.compute_seconds": answer.compute_ns / _S,
        "shardmesh.slowest.queue_seconds": answer.queue_ns / _S,
        "shardmesh.slowest.wire_seconds": wire_ns / _S,
    }


def last_shard(one: Round) -> int:
    """Say whose answer came last."""
    return max(range(len(one.answers)), key=lambda shard: one.answers[shard].received_ns)
