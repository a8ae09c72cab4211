"""Attempts at a mesh, until there is one: workers may start later than their coordinator, be found later, or come back."""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING, TypeVar

import structlog

from protos.errors import MeshError, NotServing, PlanMismatch, StaleEpoch, WorkerLost

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

log = structlog.get_logger(__name__)

T = TypeVar("T")

RETRY_S = 0.5
"""Pause between two attempts unless workers come or go meanwhile; half of it more or less."""
PATIENT_S = 10.0
"""To this the pause grows where another mesh serves meanwhile."""


async def until_mesh(
    attempt: Callable[[], Awaitable[T]],
    wait_changed: Callable[[float], Awaitable[None]],
    *,
    timeout_s: float | None = None,
    heals: Callable[[MeshError], bool] = lambda _: True,
    patient: bool = False,
) -> T:
    """Try until there is a mesh; what stands in the way is logged once, however often it is tried.

    Args:
        attempt: makes a mesh, or raises why there is none.
        wait_changed: waits until workers come or go, but no longer than so many seconds.
        timeout_s: after how many seconds no other attempt is made; 0: only one is; None: for ever.
        heals: whether an error may go away by itself, without a change of this coordinator.
        patient: whether another mesh serves meanwhile.

    Raises:
        MeshError: of the first attempt, if there is no second; of any, if it does not heal.
        NotServing: no mesh after `timeout_s`.

    """
    started, told, pause_s = time.monotonic(), "", RETRY_S
    while True:
        try:
            return await attempt()
        except MeshError as error:
            # An attempt that is under way when the time is up goes on: large weights take long.
            left_s = math.inf if timeout_s is None else started + timeout_s - time.monotonic()
            if timeout_s == 0 or not heals(error):
                raise
            if left_s <= 0:
                raise NotServing(f"no mesh within {timeout_s:g} s (--startup-timeout): {error}") from None
            if told != str(error):
                told = str(error)
                if patient:
                    log.info("no next mesh yet", reason=error.reason, error=told)
                else:
                    log.warning("no mesh yet", reason=error.reason, error=told)
        # Not in step with another coordinator that waits too.
        await wait_changed(min(random.uniform(0.5, 1.5) * pause_s, left_s))  # noqa: S311
        pause_s = min(2 * pause_s, PATIENT_S) if patient else RETRY_S


def heals_by_itself(error: MeshError) -> bool:
    """Whether more workers, or the same a little later, may be all that is missing."""
    # Two coordinators that start together on the same workers end each other's first loads: one of them holds at last.
    return isinstance(error, WorkerLost | NotServing | PlanMismatch | StaleEpoch)
