"""What a command opens in the place of a connection."""

from __future__ import annotations

from typing import Self

from coordinator.client import Credentials


class FakeConnection:
    """To the coordinator at unix:/socket; what it answers its subclasses say."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        """Connect to nobody."""
        assert address == "unix:/socket"
        assert credentials == Credentials()

    async def __aenter__(self) -> Self:
        """Open it."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
