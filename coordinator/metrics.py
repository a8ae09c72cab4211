"""What a coordinator remembers for Prometheus: how long requests took, how they ended, what rounds cost, which experts are hot.

Names and buckets are vLLM's where it has such a metric. `coordinator.exposition` adds what the mesh can be asked for.
"""

from __future__ import annotations

from collections import Counter as Counts
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram

from coordinator.completion import ABORTED
from coordinator.heat import ExpertHeat
from coordinator.models.spec import MoeSpec
from coordinator.observer import Observer
from coordinator.request import FinishReason
from coordinator.tally import Tally
from protos.errors import ERRORS

if TYPE_CHECKING:
    from coordinator.completion import Completion
    from coordinator.models.spec import ModelSpec
    from coordinator.rounds import Round
    from coordinator.scheduler import Step
    from protos.errors import MeshError

_S = 1e9

_FIRST_TOKEN_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

SUCCESSES = (*(reason.name.lower() for reason in FinishReason), ABORTED)
"""Outcomes of requests that did not fail."""


class Metrics(Observer):
    """The record of one coordinator; its methods are those of a `RoundObserver` and of an `Observer`."""

    def __init__(self, spec: ModelSpec, registry: CollectorRegistry) -> None:
        """Start with nothing.

        Args:
            spec: of the model that is served.
            registry: where the histograms go.

        """
        gates = {layer: block.gate for layer, block in enumerate(spec.feed_forward) if isinstance(block, MoeSpec)}
        self.tally = Tally()
        self.heat = ExpertHeat({layer: gate.num_experts for layer, gate in gates.items()})
        self.successes: Counts[str] = Counts(dict.fromkeys(SUCCESSES, 0))
        # All from the start: an increase from nothing would not be seen.
        self.failures: Counts[str] = Counts(dict.fromkeys(ERRORS, 0))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"shardmesh_{name}", text, buckets=buckets, registry=registry)

        self._first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_S
        )
        self._between_tokens = histogram("inter_token_latency_seconds", "From a token to the next one of its request.", _TOKEN_S)
        self._whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST_S)
        self._queue = histogram("request_queue_time_seconds", "From a request's arrival to its first step.", _REQUEST_S)
        self._prefill = histogram("request_prefill_time_seconds", "From a request's first step to its first token.", _REQUEST_S)
        self._decode = histogram("request_decode_time_seconds", "From a request's first to its last token.", _REQUEST_S)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)

    def round_answered(self, one: Round) -> None:
        """Count a round."""
        self.tally.add(one)
        if one.experts and one.layer is not None:
            self.heat.add(one.layer, one.experts)

    def step_started(self, step: Step, number: int) -> None:
        """Count a step."""
        self.tally.begin_step(step, number)

    def step_ended(self) -> None:
        """Count its time."""
        self.tally.end_step()

    def token_drawn(self, completion: Completion, pause_ns: int) -> None:
        """Note how long a caller waited for a token."""
        is_first = len(completion.sequence.generated) == 1
        (self._first_token if is_first else self._between_tokens).observe(pause_ns / _S)

    def completion_ended(self, completion: Completion) -> None:
        """Count a request that was taken."""
        if completion.outcome not in SUCCESSES:
            self.failures[completion.outcome] += 1
            return
        self.successes[completion.outcome] += 1
        request, timings = completion.sequence.request, completion.timings
        self._whole.observe(completion.elapsed_ns / _S)
        self._queue.observe(timings.queue_ns / _S)
        self._prompt.observe(len(request.prompt))
        self._generated.observe(len(completion.sequence.generated))
        if completion.sequence.generated:
            self._prefill.observe(timings.prefill_ns / _S)
            self._decode.observe(timings.decode_ns / _S)

    def request_refused(self, error: MeshError) -> None:
        """Count a request that was not taken."""
        self.failures[error.reason] += 1
