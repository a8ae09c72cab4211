"""Whom a worker obeys: a coordinator, by its certificate. Others of the same authority may ask how it is."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from protos.errors import Forbidden
from protos.tls import COORDINATOR_NAME

if TYPE_CHECKING:
    import grpc

_OPEN = ("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/")


def admit_coordinators(method: str, context: grpc.aio.ServicerContext) -> contextlib.AbstractContextManager[None]:
    """Guard of a worker that listens by TLS; health and reflection are open to every certificate of the authority.

    Raises:
        Forbidden: the peer's certificate is not a coordinator's.

    """
    names = [name.decode(errors="replace") for name in context.auth_context().get("peer_dns", ())]
    if COORDINATOR_NAME not in names and not method.startswith(_OPEN):
        raise Forbidden(
            f"only a coordinator may do that: wanted a certificate for the DNS name {COORDINATOR_NAME}, "
            f"found one for {', '.join(names) or 'no DNS name'}"
        )
    return contextlib.nullcontext()
