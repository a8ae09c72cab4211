"""Callers that read slowly, or vanish: each costs only its own stream."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys

import pytest

from tests.faults.mesh import Mesh
from tests.faults.programs import ROOT
from tests.faults.streams import ALL_STREAMS, Caller, Outcome, Stream, differences
from tests.faults.waiting import wait_until, within

pytestmark = pytest.mark.asyncio(loop_scope="package")

UNREAD = Stream("unread", (9, 8, 7), max_tokens=400)
END_S = 30.0


async def _idle(caller: Caller) -> bool:
    load = (await caller.mesh()).load
    return (load.running, load.waiting, load.used_pages) == (0, 0, 0)


def _wrong(outcomes: dict[str, Outcome], expected: dict[str, Outcome]) -> list[str]:
    return [text for stream in ALL_STREAMS for text in differences(stream, outcomes[stream.name], expected[stream.name])]


async def test_a_caller_that_does_not_read_holds_up_nobody(mesh: Mesh, served: Caller, expected: dict[str, Outcome]) -> None:
    reference = await served.generate(UNREAD)
    async with Caller(_address(mesh)) as slow:
        calls = [slow.open(UNREAD) for _ in range(4)]
        for call in calls:
            await anext(aiter(call))
        assert not _wrong(await within(END_S, "streams beside unread ones", served.generate_all()), expected)
        # The work of the unread ones is done, whether or not anybody takes it.
        await wait_until("the unread streams to be done", lambda: _idle(served), END_S)
        for call in calls:
            outcome = Outcome(arrived_s=[0.0])
            async for response in call:
                outcome.add(response)
            assert not differences(UNREAD, outcome, reference)


async def test_callers_that_cancel_leave_nothing(served: Caller, expected: dict[str, Outcome]) -> None:
    doomed = [asyncio.create_task(served.generate(UNREAD)) for _ in range(4)]
    running = asyncio.create_task(served.generate_all())
    await asyncio.sleep(0.1)
    for one in doomed:
        one.cancel()
    assert not _wrong(await running, expected)
    await wait_until("nothing to be left of cancelled calls", lambda: _idle(served), 5.0)


VANISHING = """
import asyncio, sys
from tests.faults.streams import Caller
from tests.faults.test_callers import UNREAD
async def main():
    async with Caller(sys.argv[1]) as caller:
        await caller.generate(UNREAD, lambda outcome: len(outcome.tokens) == 3 and print("reads", flush=True))
asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_caller_whose_process_dies_or_freezes_leaves_nothing(
    mesh: Mesh, served: Caller, expected: dict[str, Outcome], number: signal.Signals
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", VANISHING, _address(mesh), stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        assert await within(END_S, "the caller to read tokens", process.stdout.readline()) == b"reads\n"
        process.send_signal(number)
        assert not _wrong(await within(END_S, "streams beside a dead caller's", served.generate_all()), expected)
        await wait_until("nothing to be left of the caller", lambda: _idle(served), END_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _address(mesh: Mesh) -> str:
    return f"unix:{mesh.programs.directory / 'served'}"
