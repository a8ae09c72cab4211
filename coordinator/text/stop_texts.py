"""Stop texts: where a completion ends although no token says so.

The earliest match is the one that is complete first, so whether and where a text stops depends neither on how it was cut into
tokens nor on what would have followed; of several that are complete at the same character the longest counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopTexts:
    """Watches one completion for its stop texts and holds back what may turn out to be the beginning of one.

    Time is proportional to the text pushed and the number of stop texts, whatever their length.

    Args:
        stops: texts that end the completion; may be none.

    Raises:
        InvalidArgument: one of them is empty.

    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise InvalidArgument("a stop text must not be empty: leave it out")
        self._matchers = [_Matcher(stop) for stop in dict.fromkeys(stops)]
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Take the next piece of the completion.

        Returns:
            The text that may be emitted now, and whether a stop text was completed. Of a completed stop text and what follows it
            nothing is ever emitted.

        """
        if self._stopped:
            return "", True
        if not self._matchers:
            return text, False
        held = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            # Every matcher must see the character, so this is a list.
            complete = [len(matcher.stop) for matcher in self._matchers if matcher.advance(character)]
            if complete:
                self._stopped, self._held = True, ""
                return held[: end - max(complete)], True
        safe = len(held) - max(matcher.matched for matcher in self._matchers)
        self._held = held[safe:]
        return held[:safe], False

    def flush(self) -> str:
        """End the completion: what was held back is plain text after all."""
        held, self._held = self._held, ""
        for matcher in self._matchers:
            matcher.matched = 0
        return held


class _Matcher:
    """One stop text and how much of it the text so far ends with (Knuth, Morris, Pratt)."""

    __slots__ = ("_borders", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        # borders[n]: length of the longest proper prefix of stop[:n] that is also its suffix.
        self._borders = [0, 0]
        for character in stop[1:]:
            self._borders.append(self._extend(self._borders[-1], character))

    def advance(self, character: str) -> bool:
        """Take one character; say whether the stop text is complete."""
        self.matched = self._extend(self.matched, character)
        return self.matched == len(self.stop)

    def _extend(self, matched: int, character: str) -> int:
        while matched and self.stop[matched] != character:
            matched = self._borders[matched]
        return matched + 1 if self.stop[matched] == character else 0
