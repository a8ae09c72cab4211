"""What is asked of meshes in a cluster: the same streams again and again, so that whatever happens, happens to some of them."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Self

import grpc

from tests.faults.streams import GREEDY_STREAM, SEEDED_STREAM, Outcome, Stream, broken_differences
from tests.faults.waiting import wait_until
from tests.kind.cluster import tell

if TYPE_CHECKING:
    from tests.kind.release import Release

NEW_TOKENS = 96
STREAMS = tuple(Stream(one.name, one.prompt, NEW_TOKENS, one.sampling) for one in (GREEDY_STREAM, SEEDED_STREAM))
MORE_S = 240.0
"""Longest that a machine which does much else may take for another stream of each kind."""
PAUSE_S = 0.5


class Load:
    """A caller for each stream who asks for it again and again, on another connection after each refusal, as a client does."""

    def __init__(self, release: Release, pod: str = "") -> None:
        """Ask nothing yet.

        Args:
            release: that is called.
            pod: coordinator that is called; empty: any that is ready.

        """
        self.outcomes: dict[str, list[Outcome]] = {stream.name: [] for stream in STREAMS}
        self._release = release
        self._pod = pod
        self._stop = asyncio.Event()
        self._calling: list[asyncio.Task[None]] = []

    async def wait_more(self) -> None:
        """Wait until a stream of each kind has begun and ended from here on."""
        wanted = {name: len(found) + 2 for name, found in self.outcomes.items()}
        await wait_until("more streams", lambda: all(len(self.outcomes[name]) >= wanted[name] for name in wanted), MORE_S)

    def tell(self, what: str) -> None:
        """Print what the callers felt."""
        found = [one for outcomes in self.outcomes.values() for one in outcomes]
        refused = sum(one.code is not grpc.StatusCode.OK for one in found)
        tell(f"{what}: {len(found) - refused} streams and {refused} refusals, longest pause", max(map(_pause_s, found)))

    def differences(self, expected: dict[str, Outcome]) -> list[str]:
        """Say everything in which a stream is not what it should be: refused before its first token, or whole and the same."""
        return [
            text
            for stream in STREAMS
            for outcome in self.outcomes[stream.name]
            for text in _differences(stream, outcome, expected[stream.name])
        ]

    async def __aenter__(self) -> Self:
        """Begin, and wait until a stream of each kind has ended."""
        self._calling = [asyncio.create_task(self._call(stream)) for stream in STREAMS]
        await self.wait_more()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let the running streams end."""
        self._stop.set()
        await asyncio.gather(*self._calling)

    async def _call(self, stream: Stream) -> None:
        while not self._stop.is_set():
            # A coordinator may go between being found ready and being connected to.
            with suppress(AssertionError):
                async with self._release.caller(self._pod) as caller:
                    while not self._stop.is_set():
                        outcome = await caller.generate(stream)
                        self.outcomes[stream.name].append(outcome)
                        if outcome.code is not grpc.StatusCode.OK:
                            break
            await asyncio.sleep(PAUSE_S)


def _differences(stream: Stream, outcome: Outcome, expected: Outcome) -> list[str]:
    wrong = broken_differences(stream, outcome, expected, (grpc.StatusCode.UNAVAILABLE,))
    if outcome.tokens and outcome.code is not grpc.StatusCode.OK:
        wrong.append(f"{stream.name}: lost after {len(outcome.tokens)} tokens: {outcome.code.name} {outcome.details}")
    return wrong


def _pause_s(outcome: Outcome) -> float:
    return outcome.longest_pause_s
