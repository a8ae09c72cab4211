"""What a program reads from files that others may replace while it runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

import structlog

from protos.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

log = structlog.get_logger(__name__)

T = TypeVar("T")


class WatchedFiles(Generic[T]):
    """The meaning of some files, as new as they are."""

    def __init__(self, paths: Sequence[Path], load: Callable[[], T]) -> None:
        """Read them for the first time.

        Args:
            paths: of the files.
            load: reads them; raises `InvalidArgument`, with a text that may be logged, if they are no good.

        Raises:
            InvalidArgument: what `load` raises.

        """
        self._paths = tuple(paths)
        self._load = load
        self._lock = threading.Lock()
        self._refused: tuple[object, str] | None = None
        # Before they are read: files that change meanwhile are read again.
        self._stamp = self._take_stamp()
        self._value = load()

    def current(self) -> T:
        """Give what the files say now: the same object as long as they do not change. Safe in any thread.

        New files that are no good leave the old value in force, and one line in the log.
        """
        with self._lock:
            stamp = self._take_stamp()
            if stamp != self._stamp:
                try:
                    self._value = self._load()
                except InvalidArgument as error:
                    if self._refused != (stamp, str(error)):
                        self._refused = (stamp, str(error))
                        log.warning("new files cannot be used, the old ones stay in force", error=str(error))
                else:
                    self._stamp = stamp
                    log.info("files read again", files=[str(path) for path in self._paths])
            return self._value

    def _take_stamp(self) -> object:
        """What differs whenever a file does: Kubernetes swaps a link above them, people write in place."""
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
