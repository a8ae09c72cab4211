"""Rounds as a mesh would record them, of two workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.rounds import Answer, Round

if TYPE_CHECKING:
    from collections.abc import Sequence

MS = 1_000_000
STEP_MS = 20


def make_round(
    action: str,
    *,
    step: int = 1,
    layer: int | None = None,
    num_rows: int = 1,
    started_ms: float = 0,
    lasted_ms: float = 4,
    compute_ms: tuple[float, ...] = (3, 2),
) -> Round:
    started, ended = round(started_ms * MS), round((started_ms + lasted_ms) * MS)
    answers = tuple(
        Answer(round(compute * MS), MS // 10, ended, 50 + 10 * shard, ended) for shard, compute in enumerate(compute_ms)
    )
    workers = tuple(f"worker-{shard}" for shard in range(len(answers)))
    return Round(action, layer, step, num_rows, started, started + MS // 10, 100, answers, workers, experts=b"")


def make_steps(num_rows: Sequence[int], sampled: Sequence[int] | None = None) -> list[Round]:
    """Steps of one layer and a head, one every 20 ms; `sampled` rows reach the head, 1 by default."""
    rounds = []
    for index, rows in enumerate(num_rows):
        step, start = index + 1, index * STEP_MS
        rounds += [
            make_round("attend", step=step, layer=0, num_rows=rows, started_ms=start),
            make_round("feed_forward", step=step, layer=0, num_rows=rows, started_ms=start + 5),
            make_round("head", step=step, num_rows=sampled[index] if sampled else 1, started_ms=start + 10),
        ]
    return [one for one in rounds if one.num_rows]
