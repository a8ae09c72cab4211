"""The steps of a tokenizer's decoder, one token at a time.

The library `tokenizers` decodes a whole list of tokens by a chain of steps that its file names (`decoder` in tokenizer.json).
Here each of these steps takes one piece at a time and gives back what is certain, so that a text can be streamed and is in the
end, character by character, what the library makes of the whole list.
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, Protocol

from tokenizers import Regex, decoders

from protos.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class Step(Protocol):
    """One step of a decoder."""

    def push(self, piece: str) -> Iterator[str]:
        """Take a piece, give what is certain."""
        ...

    def flush(self) -> Iterator[str]:
        """Give what was held back; the text is over."""
        ...


def decoder_steps(decoder: Mapping[str, object] | None) -> Callable[[], list[Step]]:
    """Read the decoder of a tokenizer.json; the result makes fresh steps for one text.

    Raises:
        ModelError: a kind of decoder that cannot be streamed.

    """
    if decoder is None:
        return lambda: [Spaced()]
    factories = list(_factories(decoder))

    def fresh() -> list[Step]:
        return [factory() for factory in factories]

    return fresh


def _factories(decoder: Mapping[str, object]) -> Iterator[Callable[[], Step]]:
    fused = False
    for part in _flatten(decoder):
        kind = part.get("type")
        if kind == "Fuse":
            fused = True
            continue
        yield _factory(part, fused=fused)
        fused = fused or kind == "ByteLevel"


def _flatten(decoder: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    if decoder.get("type") != "Sequence":
        yield decoder
        return
    parts = decoder.get("decoders")
    for part in parts if isinstance(parts, list) else ():
        yield from _flatten(part)


def _factory(part: Mapping[str, object], *, fused: bool) -> Callable[[], Step]:  # noqa: PLR0911  # a table
    """Read one step; `fused` says that the steps before it made one token of the whole text, so that pieces are not tokens."""
    match part, fused:
        case {"type": "ByteLevel"}, False:
            return Utf8
        case {"type": "ByteFallback"}, False:
            return ByteRuns
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}, _ if len(old) == 1 or not fused:
            return lambda: EachToken(decoders.Replace(old, new))
        case {"type": "Replace", "pattern": {"Regex": str(old)}, "content": str(new)}, False:
            return lambda: EachToken(decoders.Replace(Regex(old), new))
        case {"type": "Strip", "content": str(character), "start": int(start), "stop": int(stop)}, False:
            return lambda: EachToken(decoders.Strip(character, start, stop))
        case {"type": "Strip", "content": str(character), "start": int(start), "stop": 0}, True:
            return lambda: StripStart(character, start)
        case {"type": "Metaspace", "replacement": str(character), "prepend_scheme": str(scheme)}, False:
            return lambda: EachToken(decoders.Metaspace(replacement=character, prepend_scheme=scheme))
        case {"type": "WordPiece", "prefix": str(prefix), "cleanup": bool(cleanup)}, False:
            return lambda: EachToken(decoders.WordPiece(prefix=prefix, cleanup=cleanup))
        case {"type": "BPEDecoder", "suffix": str(suffix)}, False:
            return lambda: WordEnds(suffix)
    raise ModelError(
        f"tokenizer.json: decoder {part.get('type')!r} cannot be streamed: use another tokenizer file, or --prompt-ids"
    )


class Utf8:
    """Byte-level tokens: each character stands for a byte (GPT-2); bytes that are no UTF-8 become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: str) -> Iterator[str]:
        """Take a token, give whole characters."""
        try:
            data = bytes(map(_BYTES.__getitem__, piece))
        except KeyError:  # an added token that is spelled as it reads
            data = piece.encode()
        yield self._decoder.decode(data)

    def flush(self) -> Iterator[str]:
        """Give U+FFFD for a character that never became whole."""
        yield self._decoder.decode(b"", final=True)


def _byte_characters() -> dict[str, int]:
    """GPT-2's table: printable bytes of Latin-1 stand for themselves, the others for U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTES = _byte_characters()


class ByteRuns:
    """Byte-fallback tokens `<0xE2>`: a run of them is one text if all of it is UTF-8, otherwise U+FFFD for each byte.

    The last byte of a run decides about the first one, so nothing of a run is certain before a token of another kind.
    """

    _TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>", re.ASCII)

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, piece: str) -> Iterator[str]:
        """Take a token, give it and the run before it."""
        if byte := self._TOKEN.fullmatch(piece):
            self._run.append(int(byte[1], 16))
            return
        yield from self.flush()
        yield piece

    def flush(self) -> Iterator[str]:
        """Give the run."""
        run, self._run = bytes(self._run), bytearray()
        if run:
            try:
                yield run.decode()
            except UnicodeDecodeError:
                yield "\N{REPLACEMENT CHARACTER}" * len(run)


class EachToken:
    """A step of the library that treats each token by itself, and perhaps the first one differently (no leading space)."""

    _FIRST = "x"

    def __init__(self, decoder: decoders.Decoder) -> None:
        self._decoder = decoder
        self._before: Sequence[str] = ()

    def push(self, piece: str) -> Iterator[str]:
        """Take a token, give its text."""
        text = self._decoder.decode([*self._before, piece])
        yield text[len(self._before) :]
        self._before = (self._FIRST,)

    def flush(self) -> Iterator[str]:
        """Nothing is ever held back."""
        yield from ()


class StripStart:
    """Takes up to so many leading characters off the whole text (Llama's first space)."""

    def __init__(self, character: str, start: int) -> None:
        self._character = character
        self._left = start

    def push(self, piece: str) -> Iterator[str]:
        """Take a piece, give it without what is to be stripped."""
        while self._left and piece:
            if not piece.startswith(self._character):
                self._left = 0
                break
            piece = piece[1:]
            self._left -= 1
        yield piece

    def flush(self) -> Iterator[str]:
        """Nothing is ever held back."""
        yield from ()


class WordEnds:
    """Tokens that end a word carry a suffix; it becomes a space, but not in the last token (GPT-1)."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._last: str | None = None

    def push(self, piece: str) -> Iterator[str]:
        """Take a token, give the one before."""
        if self._last is not None:
            yield self._last.replace(self._suffix, " ")
        self._last = piece

    def flush(self) -> Iterator[str]:
        """Give the last token."""
        if self._last is not None:
            yield self._last.replace(self._suffix, "")
        self._last = None


class Spaced:
    """No decoder: tokens with a space between them."""

    def __init__(self) -> None:
        self._first = True

    def push(self, piece: str) -> Iterator[str]:
        """Take a token, give its text."""
        yield piece if self._first else f" {piece}"
        self._first = False

    def flush(self) -> Iterator[str]:
        """Nothing is ever held back."""
        yield from ()
