"""What a coordinator tells others of its work, where it is asked to: metrics for Prometheus, traces for OpenTelemetry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.observer import Observer, Observers
from coordinator.rounds import RoundObservers

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.config import ServeSettings
    from coordinator.exposition import Exporter
    from coordinator.metrics import Metrics
    from coordinator.rounds import RoundObserver
    from coordinator.served_model import ServedModel
    from coordinator.status import MeshStatus
    from coordinator.tracing import Tracing


class Telemetry:
    """Metrics and traces of one coordinator, each only if its settings ask for it."""

    def __init__(
        self,
        settings: ServeSettings,
        model: ServedModel,
        status: Callable[[], MeshStatus | None],
        observer: RoundObserver | None = None,
    ) -> None:
        """Begin to remember; `listen` begins to tell.

        Args:
            settings: of the service.
            model: that is served.
            status: gives that of the mesh; None before there is a plan.
            observer: told of each round in the place of the metrics.

        Raises:
            InvalidArgument: traces are asked for, and their library is not installed or cannot be set up.

        """
        self._metrics_listen = settings.metrics_listen
        self._exporter: Exporter | None = None
        self._tracing: Tracing | None = None
        self.metrics: Metrics | None = None
        """None: they are not asked for."""
        self.rounds = observer
        """Told of each round; None: nobody listens."""
        observers: list[Observer] = []
        # Who asks for neither does not wait for their libraries, and needs none of them.
        if settings.metrics_listen:
            from coordinator.exposition import Exporter  # noqa: PLC0415

            self._exporter = Exporter(model, status)
            self.metrics = self._exporter.metrics
            self.rounds = observer or self.metrics.round_answered
            observers.append(self.metrics)
        if settings.trace_to:
            from coordinator.tracing import Tracing  # noqa: PLC0415

            self.rounds = rounds = RoundObservers([self.rounds] if self.rounds else [])
            self._tracing = Tracing.open(settings.trace_to, settings.model.model, rounds)
            observers.append(self._tracing.spans)
        self.observer = observers[0] if len(observers) == 1 else Observers(observers)
        """Told of all else."""

    @property
    def metrics_url(self) -> str | None:
        """Where metrics are served; None if they are not."""
        return self._exporter.url if self._exporter else None

    async def listen(self) -> None:
        """Start answering scrapes.

        Raises:
            InvalidArgument: the address is in use or cannot be taken.

        """
        if self._exporter and self._metrics_listen:
            await self._exporter.listen(self._metrics_listen)

    async def stop(self) -> None:
        """Stop answering, and send the spans that are left. Idempotent."""
        if self._exporter:
            await self._exporter.stop()
        if self._tracing:
            await self._tracing.stop()
