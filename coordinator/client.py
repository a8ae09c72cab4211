"""A caller of the Generation service: what `coordctl` uses, in the cluster and on its private mesh alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import grpc

from coordinator.channel import PeerChannel
from protos import rpc
from protos.errors import InvalidArgument, MeshError, WorkerLost, from_rpc_error
from protos.generation_pb2 import (
    GenerateRequest,
    GenerateResponse,
    GetMeshRequest,
    GetMeshResponse,
    GetModelRequest,
    GetModelResponse,
    ReshardRequest,
)
from protos.generation_pb2_grpc import GenerationStub

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from protos.certificates import Certificates

_OPTIONS = rpc.channel_options(max_send_bytes=rpc.MAX_CALLER_BYTES, max_receive_bytes=rpc.MAX_CALLER_BYTES)

CALL_DEADLINE_S = 10.0
"""Of everything but Generate, which may take as long as its tokens."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a caller shows, and whom it trusts."""

    certificates: Certificates | None = None
    """For TLS, where the coordinator is reached by TCP; None for plaintext."""
    api_key: str | None = field(default=None, repr=False)


class GenerationClient:
    """A channel to one coordinator."""

    def __init__(self, address: str, credentials: Credentials = Credentials()) -> None:
        """Make the channel.

        Args:
            address: checked by `protos.rpc.check_address`.
            credentials: of the caller.

        """
        self._peer = f"coordinator {address}"
        self._channel = PeerChannel(address, _OPTIONS, credentials.certificates)
        self._metadata = (("authorization", f"Bearer {credentials.api_key}"),) if credentials.api_key else None
        self._stub = GenerationStub(self._channel.current())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateResponse, None]:
        """Stream one completion; closing the generator cancels it.

        Raises:
            MeshError: what the coordinator says, or that it cannot be reached.

        """
        call = self._stub.Generate(request, metadata=self._metadata)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        finally:
            call.cancel()

    async def model(self) -> GetModelResponse:
        """Ask what model is served.

        Raises:
            MeshError: as above.

        """
        try:
            response: GetModelResponse = await self._stub.GetModel(
                GetModelRequest(), timeout=CALL_DEADLINE_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        return response

    async def mesh(self) -> GetMeshResponse:
        """Ask for workers, plan, load and health.

        Raises:
            MeshError: as above.

        """
        try:
            response: GetMeshResponse = await self._stub.GetMesh(
                GetMeshRequest(), timeout=CALL_DEADLINE_S, metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        return response

    async def reshard(self, num_shards: int) -> None:
        """Ask for another number of shards; `mesh` tells how far that is.

        Raises:
            MeshError: as above; that the model cannot be cut into so many; that the API key is not an operator's.

        """
        try:
            await self._stub.Reshard(ReshardRequest(num_shards=num_shards), timeout=CALL_DEADLINE_S, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None

    def _error(self, error: grpc.aio.AioRpcError) -> MeshError:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return MeshError(f"{self._peer} does not offer shardmesh.v1.Generation: is it a coordinator, and of this version?")
        if error.code() is grpc.StatusCode.UNAVAILABLE and (reason := self._channel.explain(error)):
            return WorkerLost(f"{self._peer}: {reason}")
        translated = from_rpc_error(error, self._peer)
        # The caller's own mistake is nobody's whose address matters.
        return InvalidArgument(error.details()) if isinstance(translated, InvalidArgument) else translated

    async def __aenter__(self) -> Self:
        """Use as a context that closes the channel."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the channel."""
        await self._channel.close()
