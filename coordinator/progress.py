"""What a person sees while weights load."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TransferSpeedColumn

if TYPE_CHECKING:
    from coordinator.workers.pool import LoadEvent


class LoadProgress:
    """A bar for each worker on standard error; nothing where that is no terminal."""

    def __init__(self) -> None:
        """Entering the context shows it."""
        self._progress = Progress(
            TextColumn("shard {task.fields[shard]} on {task.fields[address]}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: LoadEvent) -> None:
        """Show a worker's progress."""
        if event.address not in self._tasks:
            name = event.address.rpartition("/")[2]
            self._tasks[event.address] = self._progress.add_task("", shard=event.shard, address=name, total=event.total_bytes)
        self._progress.update(self._tasks[event.address], completed=event.loaded_bytes, total=event.total_bytes)

    def __enter__(self) -> Self:
        """Show the bars."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Take them away."""
        self._progress.stop()
