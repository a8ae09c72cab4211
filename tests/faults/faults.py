"""All faults that a worker, its network or its answers may have, by name: done once, at a moment of a step."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from protos.shardworker_pb2 import ExecuteResponse
    from tests.faults.mesh import Worker

SLOW_S = 0.01


def restart(worker: Worker) -> None:
    """End the process; the one that takes its place at once holds nothing."""
    worker.kill()
    worker.start()


def slow(worker: Worker) -> None:
    """Have the network take its time from now on."""
    worker.link.delay_s = SLOW_S


def spoil(message: ExecuteResponse) -> None:
    """Put a NaN into an answer."""
    tensor = message.partial if message.WhichOneof("result") == "partial" else message.head.logits
    tensor.data = tensor.data[:-4] + struct.pack("<f", math.nan)


def age(message: ExecuteResponse) -> None:
    """Make an answer one of an older epoch."""
    message.epoch -= 1


FAULTS: dict[str, Callable[[Worker, Any], None]] = {
    "kill": lambda worker, _: worker.kill(),
    "restart": lambda worker, _: restart(worker),
    "freeze": lambda worker, _: worker.freeze(),
    "reset": lambda worker, _: worker.link.reset(),
    "hold": lambda worker, _: worker.link.hold(),
    "slow": lambda worker, _: slow(worker),
    "nan": lambda _, message: spoil(message),
    "old epoch": lambda _, message: age(message),
}
LIES = ("nan", "old epoch")
"""Those that are done to an answer; the others may happen at any time."""
