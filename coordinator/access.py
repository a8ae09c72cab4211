"""Who a coordinator is to its workers and callers, and whom it lets in: its certificates and API keys, opened once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.api_keys import FOR_OPERATORS, ApiKeys
from protos import tls
from protos.errors import Forbidden
from protos.interceptors import Guard, admit_all

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import grpc

    from coordinator.config import ServeSettings
    from protos.certificates import Certificates


@dataclass(frozen=True, slots=True)
class Access:
    """What a coordinator shows, and asks for."""

    certificates: Certificates | None
    """Shown to workers, and trusted of them."""
    listener: grpc.ServerCredentials | None
    """Of the listener for callers; None: plaintext."""
    guard: Guard
    """Around each call."""


def open_access(settings: ServeSettings) -> Access:
    """Read the files that the settings name.

    Raises:
        InvalidArgument: one is missing, damaged, expired or for another role.

    """
    security = settings.security
    certificates, listener = None, None
    if security.tls or security.caller_tls:
        # Who uses no TLS does not wait for its library.
        from protos.certificates import CERTIFICATE_FILE, FILES, KEY_FILE, Certificates  # noqa: PLC0415

        shown: Certificates | None = None
        if security.tls:
            shown = certificates = Certificates(security.tls, name=tls.COORDINATOR_NAME)
        if security.caller_tls:
            needs = FILES if security.require_caller_certificate else (CERTIFICATE_FILE, KEY_FILE)
            shown = Certificates(security.caller_tls, needs=needs)
        if shown and not settings.listen.startswith("unix:"):
            listener = tls.server_credentials(shown, require_client=security.require_caller_certificate)
    return Access(certificates, listener, _guard(settings))


def _guard(settings: ServeSettings) -> Guard:
    if settings.security.api_keys:
        return ApiKeys(settings.security.api_keys)
    # A socket file has one user, and --insecure allows what would be refused.
    closed = settings.security.require_caller_certificate and not settings.insecure
    return admit_callers if closed else admit_all


def admit_callers(method: str, context: grpc.aio.ServicerContext) -> AbstractContextManager[None]:
    """Guard of a server that asks for certificates alone: they say who may call, not who is an operator."""
    if method == FOR_OPERATORS:
        raise Forbidden(f"{method} is for operators, whom certificates do not tell from callers: start with --api-keys FILE")
    return admit_all(method, context)
