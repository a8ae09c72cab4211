"""A coordinator that finds no room for a next mesh beside the one that serves: `python -m tests.faults.no_room serve ...`."""

from __future__ import annotations

from unittest import mock

from coordinator.cli import main
from protos.errors import OutOfMemory


def refuse(*_: object) -> None:
    """Stand for the check of workers' memory."""
    raise OutOfMemory("no room beside what is held now")


if __name__ == "__main__":
    with mock.patch("coordinator.workers.pool.check_beside", refuse):
        main()
