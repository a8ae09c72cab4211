"""Which sequence of a session holds which tokens and pages. Pure Python.

A batch is checked as a whole before anything of it is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protos.errors import InvalidArgument, PositionMismatch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from protos.shardworker_pb2 import Batch, SequenceRows


class HeldPosition(PositionMismatch):
    """A sequence does not stand where the coordinator thinks it does."""

    def __init__(self, sequence: int, wanted: int, position: int) -> None:
        super().__init__(f"sequence {sequence}: wanted position {wanted}, the worker stands at {position}: begin it anew at 0")
        self.sequence = sequence
        self.position = position


@dataclass(slots=True)
class Table:
    """One sequence."""

    num_tokens: int = 0
    """Committed."""
    pages: list[int] = field(default_factory=list)
    contiguous: bool = True
    """Whether each page is the one before plus one."""

    def append(self, pages: Iterable[int]) -> None:
        """Take further pages."""
        for page in pages:
            self.contiguous = self.contiguous and (not self.pages or page == self.pages[-1] + 1)
            self.pages.append(page)

    def truncate(self, num_pages: int) -> list[int]:
        """Give up all but the first pages."""
        given = self.pages[num_pages:]
        if given:
            del self.pages[num_pages:]
            self.contiguous = all(b == a + 1 for a, b in zip(self.pages, self.pages[1:], strict=False))
        return given


class PageTables:
    """All sequences of a session."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self._num_pages = num_pages
        self._page_tokens = page_tokens
        self._tables: dict[int, Table] = {}
        self._owners: dict[int, int] = {}

    def check(self, batch: Batch) -> None:
        """See whether a batch can begin.

        Raises:
            HeldPosition: a sequence holds fewer tokens than the batch builds on.
            InvalidArgument: the batch contradicts itself, or asks for pages that are not to be had.

        """
        if not batch.sequences:
            raise InvalidArgument("a batch needs at least one sequence")
        released = set(batch.released)
        given = {page for sequence in released for page in self._pages(sequence)}
        seen: set[int] = set()
        for rows in batch.sequences:
            if rows.sequence == 0 or rows.sequence in seen or rows.num_rows == 0 or rows.prompt_tokens == 0:
                raise InvalidArgument(f"sequence {rows.sequence}: wanted a number >= 1 that stands once, with rows and a prompt")
            seen.add(rows.sequence)
            table = None if rows.sequence in released else self._tables.get(rows.sequence)
            held = table.num_tokens if table else 0
            if rows.position > held:
                raise HeldPosition(rows.sequence, rows.position, held)
            kept = self._count(rows.position)
            if table:
                given.update(table.pages[kept:])
            if kept + len(rows.pages) != (wanted := self._count(rows.position + rows.num_rows)):
                raise InvalidArgument(
                    f"sequence {rows.sequence}: pages for positions below {rows.position + rows.num_rows}: wanted {wanted}, "
                    f"found {kept} held and {len(rows.pages)} new"
                )
        self._check_pages(batch, given)

    def begin(self, batch: Batch) -> list[Table]:
        """Do what `check` allowed, and cut off what is beyond each position; the tables of the batch's sequences, in order."""
        for sequence in batch.released:
            for page in self._pages(sequence):
                del self._owners[page]
            self._tables.pop(sequence, None)
        tables = [self._tables.setdefault(rows.sequence, Table()) for rows in batch.sequences]
        for rows, table in zip(batch.sequences, tables, strict=True):
            for page in table.truncate(self._count(rows.position)):
                del self._owners[page]
            table.num_tokens = rows.position
        for rows, table in zip(batch.sequences, tables, strict=True):
            table.append(rows.pages)
            self._owners.update(dict.fromkeys(rows.pages, rows.sequence))
        return tables

    def commit(self, rows: Iterable[SequenceRows]) -> None:
        """The rows' keys and values are all written: the sequences hold them."""
        for part in rows:
            self._tables[part.sequence].num_tokens = part.position + part.num_rows

    def _check_pages(self, batch: Batch, given: set[int]) -> None:
        taken: set[int] = set()
        for rows in batch.sequences:
            for page in rows.pages:
                if page >= self._num_pages:
                    raise InvalidArgument(f"sequence {rows.sequence}: page {page} of {self._num_pages}")
                if page in taken or (page in self._owners and page not in given):
                    holder = f"sequence {self._owners[page]}" if page in self._owners else "another place of this batch"
                    raise InvalidArgument(f"sequence {rows.sequence}: page {page} is in use by {holder}")
                taken.add(page)

    def _pages(self, sequence: int) -> list[int]:
        table = self._tables.get(sequence)
        return table.pages if table else []

    def _count(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)
