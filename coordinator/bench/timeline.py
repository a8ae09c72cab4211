"""A timeline of rounds as Chrome trace events, which Perfetto and chrome://tracing show. Pure.

What the coordinator did is known by its own clock: steps, rounds, and the gaps between rounds, which are named for the work of
`coordinator.forward` that falls there. Of a worker only durations are known (`queue_ns`, `compute_ns`), not when: its time is put
into the middle of its round, as if the way there had taken as long as the way back; the two ways are the wire's track, for the
worker that took longest. An answer counts as arrived when it was read, and answers are read in shard order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from coordinator.rounds import Answer, Round

COORDINATOR, WIRE, FIRST_WORKER = 0, 1, 2
"""Process ids of the trace."""

_STEPS, _ROUNDS, _GAPS = 0, 100, 200
"""First thread ids of the coordinator's tracks; what overlaps goes to the next one."""
_QUEUE, _COMPUTE = 0, 100

Event = dict[str, Any]


class Span(NamedTuple):
    """A piece of time, nanoseconds."""

    name: str
    start_ns: int
    end_ns: int
    details: dict[str, Any]


def trace_events(rounds: Sequence[Round]) -> list[Event]:
    """Make the events of a trace; its time begins with the first round.

    Args:
        rounds: of any number of steps.

    """
    if not rounds:
        return []
    ordered = sorted(rounds, key=lambda one: one.started_ns)
    origin = ordered[0].started_ns
    num_workers = len(ordered[0].answers)
    events = _process(COORDINATOR, "coordinator") + _process(WIRE, "wire")
    events += _track(COORDINATOR, _STEPS, "steps", _steps(ordered), origin)
    events += _track(COORDINATOR, _ROUNDS, "rounds", map(_round_span, ordered), origin)
    events += _track(COORDINATOR, _GAPS, "between rounds", _gaps(ordered), origin)
    events += _track(WIRE, 0, "slowest worker", [span for one in ordered for span in _ways(one)], origin)
    for worker in range(num_workers):
        events += _process(FIRST_WORKER + worker, f"worker {worker}")
        spans = [_worker_spans(one, one.answers[worker]) for one in ordered]
        events += _track(FIRST_WORKER + worker, _QUEUE, "queue", [queue for queue, _ in spans], origin)
        events += _track(FIRST_WORKER + worker, _COMPUTE, "compute", [compute for _, compute in spans], origin)
    return events


def _steps(rounds: Sequence[Round]) -> list[Span]:
    numbers = dict.fromkeys(one.step for one in rounds)
    steps = [[one for one in rounds if one.step == number] for number in numbers]
    return [
        Span(f"step {step[0].step}", step[0].started_ns, max(one.ended_ns for one in step), {"rows": step[0].num_rows})
        for step in steps
    ]


def _round_span(one: Round) -> Span:
    details = {"rows": one.num_rows, "request_bytes": one.request_bytes, "answer_bytes": [a.num_bytes for a in one.answers]}
    return Span(_name(one), one.started_ns, one.ended_ns, {**details, "overhead_us": one.overhead_ns / 1e3})


def _name(one: Round) -> str:
    return one.action if one.layer is None else f"{one.action} {one.layer}"


def _gaps(rounds: Iterable[Round]) -> list[Span]:
    """Times in which no round was under way."""
    gaps = []
    latest: Round | None = None
    for one in rounds:
        if latest is not None and one.started_ns > latest.ended_ns:
            gaps.append(Span(_work_between(latest, one), latest.ended_ns, one.started_ns, {}))
        if latest is None or one.ended_ns > latest.ended_ns:
            latest = one
    return gaps


def _work_between(before: Round, after: Round) -> str:
    if before.step != after.step:
        return "sample, emit, schedule, embed, norm"
    match before.action, after.action:
        case "project", _:
            return "sum of squares"
        case _, "feed_forward":
            return "reduce, norm, gate"
        case "head", "head":
            return "sample"
    return "reduce, norm"


def _worker_spans(one: Round, answer: Answer) -> tuple[Span, Span]:
    """Queue and compute of a worker, in the middle of its round."""
    way_ns = max(0, answer.arrived_ns - one.started_ns - answer.queue_ns - answer.compute_ns) // 2
    arrived = one.started_ns + way_ns
    computes = arrived + answer.queue_ns
    return (
        Span(_name(one), arrived, computes, {}),
        Span(_name(one), computes, computes + answer.compute_ns, {"rows": one.num_rows}),
    )


def _ways(one: Round) -> tuple[Span, Span]:
    """There and back of the worker that was longest at work."""
    slowest = max(one.answers, key=lambda answer: answer.queue_ns + answer.compute_ns)
    queue, compute = _worker_spans(one, slowest)
    size = {"bytes": one.request_bytes}
    return (
        Span(f"{_name(one)}: request", one.started_ns, queue.start_ns, size),
        Span(f"{_name(one)}: answer", compute.end_ns, max(compute.end_ns, one.ended_ns), {"bytes": slowest.num_bytes}),
    )


def _track(process: int, thread: int, name: str, spans: Iterable[Span], origin: int) -> list[Event]:
    """Events of a track, and of further ones beside it where spans overlap."""
    ends: list[int] = []
    events: list[Event] = []
    for span in sorted(spans, key=lambda span: span.start_ns):
        lane = next((number for number, end in enumerate(ends) if end <= span.start_ns), len(ends))
        if lane == len(ends):
            ends.append(0)
            events.append(_metadata("thread_name", process, thread + lane, name))
        ends[lane] = span.end_ns
        events.append(
            {
                "ph": "X",
                "name": span.name,
                "pid": process,
                "tid": thread + lane,
                "ts": (span.start_ns - origin) / 1e3,
                "dur": (span.end_ns - span.start_ns) / 1e3,
                "args": span.details,
            }
        )
    return events


def _process(process: int, name: str) -> list[Event]:
    order: Event = {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
    return [{"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}, order]


def _metadata(kind: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}
