"""Which moments are tried: all steps of a generation, each at a point of the step that a seed chooses; or a sample of them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from tests.faults.proxy import Moment, When
from tests.faults.streams import NEW_TOKENS

if TYPE_CHECKING:
    import asyncio

    from tests.faults.mesh import Mesh, Worker
    from tests.faults.proxy import Act

LAYERS = 3
"""Of the tiny model."""
ACTIONS = (*((action, layer) for layer in range(LAYERS) for action in ("attend", "feed_forward")), ("head", 0))


def all_moments(seed: int) -> list[Moment]:
    """Give one moment of each step, in order; between and inside layers, before, within and after a round."""
    chosen = random.Random(seed)  # noqa: S311  # for variety
    return [Moment(step, *chosen.choice(ACTIONS), chosen.choice(list(When))) for step in range(NEW_TOKENS)]


def sampled_moments(count: int, seed: int) -> list[Moment]:
    """Give a few of them, with steps from all parts of the generation."""
    chosen = random.Random(seed)  # noqa: S311  # likewise
    moments = all_moments(seed)
    size = len(moments) // count
    return [chosen.choice(moments[part * size : (part + 1) * size]) for part in range(count)]


def prepared(mesh: Mesh, worker: Worker, moment: Moment, act: Act) -> asyncio.Event:
    """Count steps from here, and lay one trap on the way to a worker; the event tells that it has sprung."""
    mesh.count_from_here()
    return worker.proxy.at(moment, act)
