"""Where a command's tables go, and how they show sizes and pauses."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from protos.generation_pb2 import MeshRecovery

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


def show_parts(recovery: MeshRecovery) -> str:
    """Write how long each part of the latest change of meshes took."""
    parts = {
        "noticed in": recovery.last_detect_ns,
        "assembled in": recovery.last_assemble_ns,
        "proven in": recovery.last_canary_ns,
        "replayed in": recovery.last_replay_ns,
    }
    return ", ".join(f"{name} {value / 1e6:.0f} ms" for name, value in parts.items())


def show_shards(count: int) -> str:
    """Say how many."""
    return "1 shard" if count == 1 else f"{count} shards"
