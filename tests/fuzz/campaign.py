"""How many messages are sent, from which seed, and the count of them: `make fuzz` sends many, the ordinary tests a sample.

Each example of hypothesis is a number that seeds the mutations: thousands a second, and whatever fails is named by its number.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import time
from collections import Counter
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SAMPLE = 4_000
MESSAGES = int(os.environ.get("FUZZ_MESSAGES", str(SAMPLE)))
"""Of all kinds together, roughly; set by `make fuzz`."""

HANG_S = 60.0
"""The process ends with a traceback of all threads if one message takes longer."""
SLOW_S = 20.0
GROWTH_BYTES = 1500 * 2**20
"""By which one message may raise the highest resident set: three times what the largest may hold besides its own 64 MiB."""

sent: Counter[str] = Counter()
"""Messages by kind and outcome."""


def fuzz(share: float, messages: int = 1) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test of one argument `number` for its share of all messages.

    Args:
        share: of `MESSAGES`.
        messages: that one example sends, roughly.

    """
    examples = max(10, int(MESSAGES * share / messages))
    chosen = settings(
        max_examples=examples,
        deadline=None,
        # A seed is only heeded where examples are drawn at random.
        derandomize=MESSAGES == SAMPLE,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    return lambda test: chosen(given(number=st.integers(0, 2**64 - 1))(test))


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """No hang and no memory blow-up inside."""
    faulthandler.dump_traceback_later(HANG_S, exit=True)
    begin, before = time.monotonic(), _peak_bytes()
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert time.monotonic() - begin < SLOW_S
    assert _peak_bytes() - before < GROWTH_BYTES


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
