"""A bare gRPC process that stands in for a worker: it spins for the time, and answers with the bytes, that it is told to.

    python -m coordinator.bench.echo unix:PATH

It reads and writes one bidirectional stream as a worker does, with the same channel options, on the same event loop, and does
nothing else. It ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

import grpc

from protos import rpc
from protos.listen import bind
from protos.program import EXIT_MISTAKE

try:
    from uvloop import new_event_loop
except ImportError:  # not on every platform
    from asyncio import new_event_loop  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

METHOD = "/shardmesh.bench.Echo/Echo"

_REQUEST = struct.Struct("<QI")
_REPLY = struct.Struct("<Q")


class Order(NamedTuple):
    """One round as it is asked for; sizes are at least what a header takes."""

    request_bytes: int
    reply_bytes: int
    spin_ns: int

    def encode(self) -> bytes:
        """Make the request."""
        header = _REQUEST.pack(self.spin_ns, max(self.reply_bytes, _REPLY.size))
        return header.ljust(self.request_bytes, b"\0")


def spun_ns(reply: bytes) -> int:
    """How long the server really spun."""
    (found,) = _REPLY.unpack_from(reply)
    return int(found)


def obey(request: bytes) -> bytes:
    """Spin, and make the reply."""
    start = time.perf_counter_ns()
    spin_ns, reply_bytes = _REQUEST.unpack_from(request)
    while (spun := time.perf_counter_ns() - start) < spin_ns:
        pass
    return _REPLY.pack(spun).ljust(reply_bytes, b"\0")


async def serve(address: str) -> None:
    """Serve until standard input ends."""
    options = rpc.server_options(max_send_bytes=rpc.MAX_WORKER_REPLY_BYTES, max_receive_bytes=rpc.MAX_WORKER_REQUEST_BYTES)
    server = grpc.aio.server(options=options)
    service, _, method = METHOD[1:].partition("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(_echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    await bind(server, address)
    await server.start()
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(grace=0)


async def _echo(request_iterator: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
    del request_iterator
    while (request := await context.read()) is not grpc.aio.EOF:
        await context.write(obey(request))


if __name__ == "__main__":
    if len(sys.argv) != 2:  # noqa: PLR2004  # the program and its one argument
        sys.exit(EXIT_MISTAKE)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(serve(sys.argv[1]))
