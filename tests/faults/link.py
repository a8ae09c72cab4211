"""A cable between a coordinator and a worker, on loopback: it can be cut, held, slowed and plugged in again."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Self

CHUNK_BYTES = 65536


class Link:
    """Carries the bytes of TCP connections to a unix socket."""

    def __init__(self, target: str) -> None:
        """Describe it; entering the context makes it.

        Args:
            target: path of the socket that connections go to.

        """
        self.address = ""
        """127.0.0.1:PORT, where it listens."""
        self.delay_s = 0.0
        """What each piece of data waits, in either direction."""
        self.refuses = False
        """Whether new connections are reset at once."""
        self._target = target
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], socket.socket] = {}

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop listening, and drop all connections."""
        if self._server:
            self._server.close()
        self.reset()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def reset(self) -> None:
        """Break all connections as a machine that was reset does it: both ends get a RST."""
        for task, connection in self._connections.items():
            _reset(connection)
            task.cancel()

    def hold(self) -> None:
        """Let nothing through, and lose nothing, as a cable that was pulled out."""
        self._flows.clear()

    def release(self) -> None:
        """Let everything through again, what was held included."""
        self._flows.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        task = asyncio.current_task()
        if self.refuses or task is None:
            _reset(connection)
            writer.transport.abort()
            return
        self._connections[task] = connection
        # Nobody listens there, an end was broken, or both were: then so is the other one.
        with contextlib.suppress(OSError, ExceptionGroup, asyncio.CancelledError):
            await self._join(reader, writer)
        del self._connections[task]
        writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_unix_connection(self._target)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(reader, far_writer))
                group.create_task(self._carry(far_reader, writer))
        finally:
            far_writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            await asyncio.sleep(self.delay_s)
            await self._flows.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError


def _reset(connection: socket.socket) -> None:
    """Have the closing of a connection be a RST."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
