"""What a person sees while weights load, and of other work that takes long."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.text import Text

if TYPE_CHECKING:
    from coordinator.workers.loading import LoadEvent


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


class StatusLine:
    """One line on standard error that says what is being done; nothing where that is no terminal.

    It stands still: a spinner's thread would take part in what is measured.
    """

    def __init__(self) -> None:
        """Entering the context, then a text, shows it."""
        self._live = Live(console=Console(file=sys.stderr), auto_refresh=False, transient=True)

    def __call__(self, text: str) -> None:
        """Show another text."""
        if sys.stderr.isatty():
            self._live.start()
            self._live.update(Text(text), refresh=True)

    def __enter__(self) -> Self:
        """Nothing is shown yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take it away."""
        self._live.stop()
