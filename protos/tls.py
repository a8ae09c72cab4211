"""TLS inside a mesh: what each end makes of its certificates.

A certificate says what its owner is, not where: it carries the DNS name of a role, and each end of a connection between
coordinator and worker demands the other's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from protos.certificates import Certificates, Identity

WORKER_NAME = "shardworker.shardmesh"
COORDINATOR_NAME = "coordinator.shardmesh"

# What gRPC says of a connection that could not be made.
_NO_CONNECTION = "failed to connect"
_NOT_TRUSTED = "CERTIFICATE_VERIFY_FAILED: "
_OTHER_NAME = "Hostname Verification Check failed"
_NOT_TLS = "WRONG_VERSION_NUMBER"
_CUT_OFF = ("Socket closed", "Connection reset", "Broken pipe", "_ALERT_")


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Make the client's side of a connection; without a certificate of its own if the identity has none."""
    return grpc.ssl_channel_credentials(identity.authorities, identity.key, identity.chain)


def server_credentials(certificates: Certificates, *, require_client: bool) -> grpc.ServerCredentials:
    """Make the server's side: each new connection is met with the certificates as they are then.

    Args:
        certificates: with a certificate and its key; with authorities too if clients must show a certificate.
        require_client: whether they must.

    """
    served = certificates.current()

    def configure(identity: Identity) -> grpc.ServerCertificateConfiguration:
        authorities = identity.authorities if require_client else None
        return grpc.ssl_server_certificate_configuration([(identity.key, identity.chain)], root_certificates=authorities)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        identity = certificates.current()
        if identity is served:
            return None
        served = identity
        return configure(identity)

    return grpc.dynamic_ssl_server_credentials(configure(served), fetch, require_client)


def explain(details: str, name: str | None) -> str | None:
    """Say in plain words why no connection could be made; None if neither certificates nor TLS seem to be the reason.

    Args:
        details: of the failed call.
        name: that the peer's certificate must carry; None if this end speaks plaintext.

    """
    if _NO_CONNECTION not in details:
        return None
    if _NOT_TRUSTED in details:
        reason = details.partition(_NOT_TRUSTED)[2].split(":")[0]
        return f"its certificate is refused: {reason}; it must be signed by a CA of ca.crt, and be valid today"
    if _OTHER_NAME in details:
        return f"its certificate is not for the name {name}"
    if _NOT_TLS in details:
        return "it does not speak TLS: was it started with --tls?"
    if any(text in details for text in _CUT_OFF):
        return "it ends the connection: " + (
            "it refuses our certificate (expired, of another CA, or none)" if name else "it wants TLS, or is no shardmesh program"
        )
    return None
