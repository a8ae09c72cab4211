"""What the engine tells as it happens; rounds are told by `coordinator.rounds.RoundObserver`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from coordinator.completion import Completion
    from coordinator.recovery import Recovery
    from coordinator.scheduler import Step
    from coordinator.sequence import SequenceId
    from protos.errors import MeshError


class Observer:
    """Told on the event loop, between rounds: a hook takes microseconds, and never raises. These do nothing."""

    def request_taken(self, completion: Completion) -> None:
        """Hear of a request that is queued; the context is that of its call."""

    def step_started(self, step: Step, number: int) -> None:
        """Hear of a step that goes out; its rounds are of steps number <= i < number + `microbatches.LIMIT`."""

    def step_ended(self) -> None:
        """Hear that the tokens of that step were drawn. A step that broke a mesh never ends."""

    def token_drawn(self, completion: Completion, pause_ns: int) -> None:
        """Hear of a token, and how long after the one before it, or after the request's arrival, it came."""

    def requests_interrupted(self, identifiers: Collection[SequenceId]) -> None:
        """Hear that a mesh is gone, and the step that was under way with it: these requests are replayed on the next one."""

    def recovery_ended(self, reason: str, recovery: Recovery) -> None:
        """Hear that another mesh serves and that every interrupted request goes on; no reason: the mesh was cut anew."""

    def completion_ended(self, completion: Completion) -> None:
        """Hear that a completion is over, for the reason of its `outcome`."""

    def request_refused(self, error: MeshError) -> None:
        """Hear of a request that never became a completion; the context is that of its call."""


class Observers(Observer):
    """Several, told one after the other."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        """Tell these, in this order."""
        self._observers = tuple(observers)

    def request_taken(self, completion: Completion) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.request_taken(completion)

    def step_started(self, step: Step, number: int) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.step_started(step, number)

    def step_ended(self) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.step_ended()

    def token_drawn(self, completion: Completion, pause_ns: int) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.token_drawn(completion, pause_ns)

    def requests_interrupted(self, identifiers: Collection[SequenceId]) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.requests_interrupted(identifiers)

    def recovery_ended(self, reason: str, recovery: Recovery) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.recovery_ended(reason, recovery)

    def completion_ended(self, completion: Completion) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.completion_ended(completion)

    def request_refused(self, error: MeshError) -> None:
        """Tell all."""
        for observer in self._observers:
            observer.request_refused(error)
