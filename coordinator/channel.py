"""A gRPC channel to one peer, with TLS where the peer is reached by TCP; a new one once the certificates' files changed."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import grpc

from protos import tls

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.certificates import Certificates


class PeerChannel:
    """A channel, and its successors."""

    def __init__(
        self,
        address: str,
        options: Sequence[tuple[str, object]],
        certificates: Certificates | None = None,
        name: str | None = None,
    ) -> None:
        """Make the channel; nothing is sent before the first call.

        Args:
            address: checked by `protos.rpc.check_address`.
            options: of the channel.
            certificates: of this end, and to check the peer's; None for plaintext, which `unix:` always is.
            name: DNS name that the peer's certificate must carry; None: the host of `address`.

        """
        self._address = address
        self._name = name or address.rpartition(":")[0]
        self._options = [*options, *([("grpc.ssl_target_name_override", name)] if name and certificates else [])]
        self._certificates = None if address.startswith("unix:") else certificates
        self._identity = self._certificates.current() if self._certificates else None
        self._channel = self._make()
        self._replaced: weakref.WeakSet[grpc.aio.Channel] = weakref.WeakSet()

    def current(self) -> grpc.aio.Channel:
        """Give the channel for a new call.

        Whoever makes the call keeps the channel until the call has ended: one that was replaced closes with its last user.
        """
        if self._certificates and (identity := self._certificates.current()) is not self._identity:
            self._replaced.add(self._channel)
            self._identity = identity
            self._channel = self._make()
        return self._channel

    def explain(self, error: grpc.aio.AioRpcError) -> str | None:
        """Say in plain words why the connection failed, as far as certificates or TLS are the reason."""
        return (
            None
            if self._address.startswith("unix:")
            else tls.explain(error.details() or "", self._name if self._certificates else None)
        )

    async def close(self) -> None:
        """Close all; running calls are cancelled."""
        for channel in (*self._replaced, self._channel):
            await channel.close()

    def _make(self) -> grpc.aio.Channel:
        if self._identity is None:
            return grpc.aio.insecure_channel(self._address, options=self._options)
        return grpc.aio.secure_channel(self._address, tls.channel_credentials(self._identity), options=self._options)
