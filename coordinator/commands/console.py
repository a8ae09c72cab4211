"""Where a command's tables go, and how they show sizes."""

from __future__ import annotations

import sys

from rich.console import Console

_FILE_WIDTH = 200
_GIB = 2**30
_MIB = 2**20
_KIB = 2**10


def table_console() -> Console:
    """Standard output; as wide as the terminal, or, without one, wide enough for every table."""
    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)


def show_bytes(num_bytes: int) -> str:
    """Write bytes in the unit in which they read best."""
    for unit, size in (("GiB", _GIB), ("MiB", _MIB), ("KiB", _KIB)):
        if num_bytes >= size:
            return f"{num_bytes // size} {unit}" if num_bytes % size == 0 else f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"
