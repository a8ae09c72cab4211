"""KV page accounting: which pages of the workers' caches are free. Every shard's cache has the same page numbers."""

from __future__ import annotations

import heapq
import math


class PagePool:
    """Pages 0 ... num_pages-1 of `page_tokens` tokens each."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        """All pages are free at first."""
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = set(range(num_pages))
        self._lowest = list(range(num_pages))  # a heap; may hold pages taken meanwhile, which are skipped

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that some sequence holds."""
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that so many tokens of one sequence fill."""
        return math.ceil(num_tokens / self.page_tokens)

    def take(self, count: int, after: int | None) -> list[int] | None:
        """Take pages, or none at all if fewer than `count` are free.

        A page that follows `after` (a sequence's last one) is preferred: workers read a run of pages in place.
        """
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            page = after + 1 if after is not None and after + 1 in self._free else self._take_lowest()
            self._free.discard(page)
            taken.append(page)
            after = page
        return taken

    def give_back(self, pages: list[int]) -> None:
        """Free pages that were taken."""
        for page in pages:
            if page in self._free:
                raise ValueError(f"page {page} is free already")
            self._free.add(page)
            heapq.heappush(self._lowest, page)
        if len(self._lowest) > 2 * self.num_pages:
            # Entries of pages that were taken as followers would pile up.
            self._lowest = sorted(self._free)

    def _take_lowest(self) -> int:
        while (page := heapq.heappop(self._lowest)) not in self._free:
            pass
        return page
