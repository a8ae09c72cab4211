"""One fault at one moment, while all kinds of streams run: what every test of the campaign does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.faults.campaign import prepared
from tests.faults.streams import ALL_STREAMS, STREAM_S, Caller, Outcome, differences
from tests.faults.waiting import within

if TYPE_CHECKING:
    from tests.faults.mesh import Mesh, Worker
    from tests.faults.proxy import Act, Moment


async def injure(
    mesh: Mesh,
    caller: Caller,
    expected: dict[str, Outcome],
    worker: Worker,
    moment: Moment,
    *,
    act: Act,
) -> dict[str, Outcome]:
    """Run all streams, do `act` at a moment of theirs on the way to one worker, and check that no stream shows it.

    The mesh is left as it is then; `Mesh.mend` makes it whole.

    Raises:
        AssertionError: a token is lost, doubled or changed, a stream did not end right, or the moment never came.

    """
    sprung = prepared(mesh, worker, moment, act)
    outcomes: dict[str, Outcome] = await within(STREAM_S + 10, f"all streams to end ({moment})", caller.generate_all())
    assert sprung.is_set(), f"{moment} never came: worker {worker.number} saw {worker.proxy.num_steps} steps"
    wrong = [text for stream in ALL_STREAMS for text in differences(stream, outcomes[stream.name], expected[stream.name])]
    assert not wrong, "\n".join([f"{moment} on worker {worker.number} of {mesh.programs.directory}:", *wrong])
    return outcomes
