"""Health on a listener of its own: probes of Kubernetes speak neither TLS nor keys, and learn nothing else there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2_grpc

from protos.interceptors import ErrorInterceptor
from protos.listen import bind, unbind
from protos.rpc import server_options

if TYPE_CHECKING:
    from grpc_health.v1 import health

_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class HealthListener:
    """A plaintext server that offers `grpc.health.v1` alone."""

    address: str
    """With the real port."""
    _server: grpc.aio.Server

    async def stop(self) -> None:
        """Stop at once."""
        await self._server.stop(None)
        unbind(self.address)


async def listen_for_probes(address: str, checker: health.aio.HealthServicer) -> HealthListener:
    """Start answering what `checker` answers elsewhere.

    Args:
        address: checked by `protos.rpc.check_address`.
        checker: of the main listener.

    Raises:
        InvalidArgument: the address is in use or cannot be taken.

    """
    server = grpc.aio.server(
        options=server_options(max_send_bytes=_MAX_BYTES, max_receive_bytes=_MAX_BYTES), interceptors=[ErrorInterceptor()]
    )
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    taken = await bind(server, address)
    await server.start()
    return HealthListener(taken, server)
