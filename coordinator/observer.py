"""What the engine tells as it happens; rounds are told by `coordinator.rounds.RoundObserver`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coordinator.completion import Completion
    from coordinator.scheduler import Step
    from protos.errors import MeshError


class Observer:
    """Told on the event loop, between rounds: a hook takes microseconds, and never raises. These do nothing."""

    def step_started(self, step: Step, number: int) -> None:
        """Hear of a step that goes out; its rounds are of steps number <= i < number + `microbatches.LIMIT`."""

    def step_ended(self) -> None:
        """Hear that the tokens of that step were drawn. A step that broke a mesh never ends."""

    def token_drawn(self, completion: Completion, pause_ns: int) -> None:
        """Hear of a token, and how long after the one before it, or after the request's arrival, it came."""

    def completion_ended(self, completion: Completion) -> None:
        """Hear that a completion is over, for the reason of its `outcome`."""

    def request_refused(self, error: MeshError) -> None:
        """Hear of a request that never became a completion."""
