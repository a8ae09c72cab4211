"""Waiting, never without an end: whoever waits says for what, and gives up with exactly that."""

from __future__ import annotations

import asyncio
import inspect
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

POLL_S = 0.02


async def wait_until(what: str, condition: Callable[[], Any], deadline_s: float) -> Any:
    """Poll until `condition` (a function or a coroutine function) is true, and give its value.

    Raises:
        AssertionError: it was not within `deadline_s` seconds.

    """
    give_up = time.monotonic() + deadline_s
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await within(deadline_s, what, value)
        if value:
            return value
        assert time.monotonic() < give_up, f"waited {deadline_s:g} s in vain: {what}"
        await asyncio.sleep(POLL_S)


async def within(deadline_s: float, what: str, work: Awaitable[Any]) -> Any:
    """Wait for work to end.

    Raises:
        AssertionError: it did not within `deadline_s` seconds.

    """
    try:
        async with asyncio.timeout(deadline_s):
            return await work
    except TimeoutError:
        raise AssertionError(f"waited {deadline_s:g} s in vain: {what}") from None
