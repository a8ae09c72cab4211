"""Whether a step goes through the layers whole, or as two halves whose rounds overlap.

Of two halves, one is on the wire or with the coordinator while the workers compute the other. That pays where the workers' time
follows the number of rows, as in prefill: a round of compute c and everything else e takes c + e whole, and max(c, c / 2 + e)
for both halves. With few rows it does not: the workers read the same weights for half of them, and both are as slow as the whole.
"""

from __future__ import annotations

from itertools import accumulate

from coordinator.scheduler import Step

MIN_ROWS = 64
"""Of a half. Below, products are bound by reading weights: 4 rows of Qwen3-30B-A3B's layers took 0.87 of the time of 8."""

LIMIT = 2
"""Parts of a step at most: workers keep as many steps open."""


def microbatches(step: Step) -> tuple[Step, ...]:
    """Cut a step between two sequences, as evenly as they allow; itself where a half would be too small.

    What is to be released comes first: the second half may be given its pages.
    """
    ends = list(accumulate(rows.num_rows for rows in step.rows))
    total = ends[-1]
    smaller, cut = max((min(end, total - end), number) for number, end in enumerate(ends, 1))
    if smaller < MIN_ROWS:
        return (step,)
    return Step(step.rows[:cut], step.released), Step(step.rows[cut:], ())
