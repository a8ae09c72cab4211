"""All that a coordinator tells Prometheus beside histograms, put together at each scrape.

Labels are bounded: addresses of workers, phases, parts, reasons, layers, ranks; nothing of a request.
`docs/observability.md` lists every name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from coordinator.metrics import Metrics
from coordinator.tally import Phase
from protos import generation_pb2
from protos.errors import ERRORS
from protos.metrics import LoopCollector, MetricsListener, make_registry, serve_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from coordinator.heat import LayerHeat
    from coordinator.served_model import ServedModel
    from coordinator.status import MeshStatus
    from coordinator.tally import Tally
    from protos.generation_pb2 import GetMeshResponse, MeshLoad

    _Kind = type[CounterMetricFamily | GaugeMetricFamily]

_COUNTER, _GAUGE = CounterMetricFamily, GaugeMetricFamily
_S = 1e9

TOP = (1, 2, 4, 8, 16, 32)
"""Of a layer's experts by popularity: the share of the most popular one, of the two most popular together, and so on."""


class Exporter:
    """The metrics of one coordinator, and their listener."""

    def __init__(self, model: ServedModel, status: Callable[[], MeshStatus | None]) -> None:
        """Begin to remember; `listen` begins to tell.

        Args:
            model: that is served.
            status: gives that of the mesh; None before there is a plan.

        """
        self._registry = make_registry()
        self.metrics = Metrics(model.spec, self._registry)
        self.url: str | None = None
        """Where metrics are served, once they are."""
        self._model = model.settings.model
        self._status = status
        self._listener: MetricsListener | None = None

    async def listen(self, address: str) -> None:
        """Start answering scrapes.

        Args:
            address: see `protos.metrics.serve_metrics`.

        Raises:
            InvalidArgument: it is in use or cannot be taken.

        """
        self._registry.register(LoopCollector(lambda: exposition(self.metrics, self._status(), self._model)))
        self._listener = await serve_metrics(address, self._registry)
        self.url = self._listener.url

    async def stop(self) -> None:
        """Stop answering. Idempotent."""
        if self._listener:
            await self._listener.stop()
            self._listener = None


async def exposition(metrics: Metrics, status: MeshStatus | None, model: str) -> list[Metric]:
    """Ask the workers, and put together what there is to say now.

    Args:
        metrics: what is remembered.
        status: of the mesh; None before there is a plan.
        model: that is served, as given to `--model`.

    """
    mesh = await status.report() if status else generation_pb2.GetMeshResponse()
    if status:
        metrics.tally.keep([worker.address for worker in mesh.workers])
    parts = status.recoveries.parts() if status else {}
    failures = dict.fromkeys(ERRORS, 0) | dict(mesh.recovery.failures)
    return [
        _family(_GAUGE, "info", "Always 1; the label says what is served.", ("model",), [((model,), 1)]),
        *_load(mesh.load),
        *_ends(metrics),
        *_mesh(mesh),
        _family(_COUNTER, "mesh_failures", "Meshes that broke, by the reason of the error.", ("reason",), _by_name(failures)),
        _family(_COUNTER, "recovery_stall_seconds", "Time that callers waited for another mesh.", ("part",), _by_name(parts, _S)),
        *_workers(mesh),
        *_phases(metrics.tally),
        *_worker_rounds(metrics.tally),
        *_experts(metrics.heat.layers()),
    ]


def _load(load: MeshLoad) -> Iterator[Metric]:
    yield _single(_GAUGE, "num_requests_running", "Requests that take part in steps.", load.running)
    yield _single(_GAUGE, "num_requests_waiting", "Requests that queue.", load.waiting)
    usage = load.used_pages / load.total_pages if load.total_pages else 0.0
    yield _single(_GAUGE, "kv_cache_usage_perc", "Share of the KV cache in use: 1 is full.", usage)
    yield _single(_GAUGE, "kv_cache_tokens", "Tokens that the KV cache holds.", load.total_pages * load.page_tokens)
    yield _single(_COUNTER, "num_preemptions", "Requests that gave up their KV pages for a while.", load.preemptions)
    yield _single(_COUNTER, "prompt_tokens", "Prompt tokens of the requests taken.", load.prompt_tokens)
    yield _single(_COUNTER, "generation_tokens", "Tokens generated.", load.completion_tokens)


def _ends(metrics: Metrics) -> Iterator[Metric]:
    text = "Requests that ended well, or whose caller left."
    yield _family(_COUNTER, "request_success", text, ("finished_reason",), _by_name(metrics.successes))
    text = "Requests that were refused or failed, by the reason of the error."
    yield _family(_COUNTER, "request_failure", text, ("reason",), _by_name(metrics.failures))


def _mesh(mesh: GetMeshResponse) -> Iterator[Metric]:
    yield _single(_GAUGE, "serving", "1 while a full mesh serves.", mesh.serving)
    yield _single(_GAUGE, "epoch", "Of this coordinator's sessions, rising with every mesh; 0 while none serves.", mesh.epoch)
    yield _single(_GAUGE, "shards", "Workers that the mesh is made of.", mesh.num_shards)
    text = "Workers that it shall be made of: not as many as it is while it is cut anew."
    yield _single(_GAUGE, "wanted_shards", text, mesh.wanted_shards)
    text = "Since a token, a caller's or the canary's, came through all shards."
    yield _single(_GAUGE, "canary_age_seconds", text, mesh.proven_ago_ns / _S)
    yield _single(_COUNTER, "recoveries", "Meshes that took the place of a broken one.", mesh.recovery.recoveries)
    text = "Meshes of another number of shards that took the place of one."
    yield _single(_COUNTER, "reshards", text, mesh.recovery.reshards)
    reachable = [worker for worker in mesh.workers if worker.reachable]
    yield _single(_GAUGE, "workers", "Workers known, spares and unreachable ones included.", len(mesh.workers))
    yield _single(_GAUGE, "workers_reachable", "Workers that answer.", len(reachable))
    spares = sum(not worker.serving for worker in reachable)
    yield _single(_GAUGE, "spares", "Workers that answer and serve no shard.", spares)


def _workers(mesh: GetMeshResponse) -> Iterator[Metric]:
    up = [((worker.address,), worker.reachable) for worker in mesh.workers]
    yield _family(_GAUGE, "worker_up", "1 if the worker answers.", ("worker",), up)
    for field, text in (
        ("weights_bytes", "Weights that the worker holds."),
        ("kv_bytes", "KV pages that the worker has reserved."),
        ("memory_free_bytes", "Free memory of the worker's device."),
        ("memory_total_bytes", "Memory of the worker's device."),
    ):
        values = [((worker.address,), getattr(worker, field)) for worker in mesh.workers if worker.reachable]
        yield _family(_GAUGE, f"worker_{field}", text, ("worker",), values)


def _phases(tally: Tally) -> Iterator[Metric]:
    callers = {phase: found for phase, found in tally.phases.items() if phase is not Phase.CANARY}
    for field, name, text, phases in (
        ("num_steps", "steps", "Steps through the model.", callers),
        ("num_rows", "step_rows", "Rows of all steps: tokens that the workers computed.", callers),
        ("step_ns", "step_seconds", "From scheduling a step to its tokens.", callers),
        ("num_rounds", "rounds", "Rounds to all shards.", tally.phases),
        ("round_ns", "round_seconds", "From before a round is serialized until its last answer is there.", tally.phases),
        ("slowest_ns", "slowest_compute_seconds", "Compute of each round's slowest worker.", tally.phases),
    ):
        values = [((phase.value,), getattr(found, field) / _scale(field)) for phase, found in phases.items()]
        yield _family(_COUNTER, name, text, ("phase",), values)
    ratios = [((phase.value,), found.straggler_ratio) for phase, found in tally.phases.items() if found.num_rounds]
    text = "Compute of a round's slowest worker over the mean of all, over the latest rounds: 1 is even."
    yield _family(_GAUGE, "straggler_ratio", text, ("phase",), ratios)


def _worker_rounds(tally: Tally) -> Iterator[Metric]:
    for field, name, text in (
        ("compute_ns", "compute_seconds", "Arithmetic of rounds, by the worker's clock."),
        ("queue_ns", "queue_seconds", "Rounds waiting for the worker's device, by the worker's clock."),
        ("wire_ns", "wire_seconds", "The way of rounds to the worker and back, serializing included."),
        ("wait_ns", "wait_seconds", "The worker had answered, and the slowest had not."),
        ("sent_bytes", "sent_bytes", "Sent to the worker, without framing."),
        ("received_bytes", "received_bytes", "Received from the worker, without framing."),
    ):
        values = [
            ((address, phase.value), getattr(worker, field) / _scale(field))
            for phase, found in tally.phases.items()
            for address, worker in found.workers.items()
        ]
        yield _family(_COUNTER, f"worker_{name}", text, ("worker", "phase"), values)


def _experts(layers: Mapping[int, LayerHeat]) -> Iterator[Metric]:
    chosen = [((str(layer),), heat.num_choices) for layer, heat in layers.items()]
    yield _family(_COUNTER, "expert_choices", "Choices of the layer's gate: rows times experts of a row.", ("layer",), chosen)
    text = "Share of the layer's most popular expert over the mean share, of the latest choices: 1 is even."
    imbalance = [((str(layer),), heat.imbalance) for layer, heat in layers.items()]
    yield _family(_GAUGE, "expert_imbalance", text, ("layer",), imbalance)
    text = "Share of the layer's so many most popular experts together, of the latest choices."
    shares = [((str(layer), str(top)), share) for layer, heat in layers.items() for top, share in heat.top_shares(TOP).items()]
    yield _family(_GAUGE, "expert_top_share", text, ("layer", "top"), shares)


def _scale(field: str) -> float:
    return _S if field.endswith("_ns") else 1.0


def _by_name(values: Mapping[str, float], scale: float = 1.0) -> list[tuple[tuple[str], float]]:
    return [((name,), value / scale) for name, value in values.items()]


def _single(kind: _Kind, name: str, text: str, value: float) -> Metric:
    return _family(kind, name, text, (), [((), value)])


def _family(
    kind: _Kind, name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    family = kind(f"shardmesh_{name}", text, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family
