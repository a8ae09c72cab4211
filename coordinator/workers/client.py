"""One worker, as the coordinator sees it: typed calls, deadlines, domain errors."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import grpc

from coordinator.channel import PeerChannel
from protos import rpc, shardworker_pb2_grpc
from protos.errors import MeshError, WorkerLost, from_rpc_error
from protos.shardworker_pb2 import (
    DescribeRequest,
    DescribeResponse,
    LoadRequest,
    LoadResponse,
    ReleaseRequest,
    SupplyOffer,
    SupplyRequest,
    WarmRequest,
    WarmResponse,
)
from protos.tls import WORKER_NAME

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from coordinator.workers.supplier import Supplier
    from protos.certificates import Certificates

_OPTIONS = rpc.channel_options(max_send_bytes=rpc.MAX_WORKER_REQUEST_BYTES, max_receive_bytes=rpc.MAX_WORKER_REPLY_BYTES)


class WorkerClient:
    """A channel to one worker."""

    def __init__(self, address: str, certificates: Certificates | None = None) -> None:
        """Make the channel; nothing is sent before the first call.

        Args:
            address: checked by `protos.rpc.check_address`.
            certificates: for TLS, if the worker is reached by TCP; None for plaintext.

        """
        self.address = address
        self._channel = PeerChannel(address, _OPTIONS, certificates, WORKER_NAME)

    async def describe(self, *, wait_for_ready: bool) -> DescribeResponse:
        """Ask what the worker is and holds.

        Args:
            wait_for_ready: whether a worker that does not listen yet is waited for until the deadline.

        Raises:
            MeshError: it does not answer within the deadline.

        """
        try:
            description: DescribeResponse = await self._stub().Describe(
                DescribeRequest(), timeout=rpc.DESCRIBE_DEADLINE_S, wait_for_ready=wait_for_ready
            )
        except grpc.aio.AioRpcError as error:
            if wait_for_ready and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                # gRPC waited and does not say for what; a call that does not wait is told.
                return await self.describe(wait_for_ready=False)
            if error.code() in {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}:
                if reason := self._channel.explain(error):
                    raise WorkerLost(f"{self._name}: {reason}") from error
                raise WorkerLost(
                    f"{self._name} does not answer within {rpc.DESCRIBE_DEADLINE_S:g} s: is it running, and is that its address? "
                    f"({error.details()})"
                ) from error
            raise self._error(error) from error
        return description

    async def load(self, request: LoadRequest) -> AsyncGenerator[LoadResponse, None]:
        """Load a plan and pass its progress on.

        Raises:
            MeshError: the worker refuses, dies, or is silent for too long.

        """
        call = self._stub().Load(request)
        try:
            while True:
                async with asyncio.timeout(rpc.LOAD_SILENCE_S):
                    response = await call.read()
                if response is grpc.aio.EOF:
                    return
                yield response
        except TimeoutError:
            raise WorkerLost(f"{self._name}: no progress of loading for {rpc.LOAD_SILENCE_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        finally:
            call.cancel()

    async def supply(self, offer: SupplyOffer, supplier: Supplier, taken: asyncio.Event) -> None:
        """Send the worker what it asks for, until it ends the call or this is cancelled.

        Args:
            offer: what is supplied.
            supplier: that has it.
            taken: set when the worker has taken the offer.

        Raises:
            MeshError: the worker refuses, or dies.

        """
        call = self._stub().Supply()
        try:
            async with asyncio.timeout(rpc.LOAD_SILENCE_S):
                await call.write(SupplyRequest(offer=offer))
                await call.initial_metadata()
            taken.set()
            while (wanted := await call.read()) is not grpc.aio.EOF:
                await call.write(SupplyRequest(bytes=await supplier.answer(wanted)))
        except TimeoutError:
            raise WorkerLost(f"{self._name} took no offer to supply it for {rpc.LOAD_SILENCE_S:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        finally:
            call.cancel()

    async def warm(self, request: WarmRequest) -> WarmResponse:
        """Have the worker bring the model's files into memory.

        Raises:
            MeshError: it does not see the same files, or does not answer within the deadline.

        """
        try:
            response: WarmResponse = await self._stub().Warm(request, timeout=rpc.WARM_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error
        return response

    async def release(self, assignment: int) -> None:
        """Have the worker drop all that it holds.

        Raises:
            MeshError: it has accepted a higher assignment, or does not answer within the deadline.

        """
        try:
            await self._stub().Release(ReleaseRequest(assignment=assignment), timeout=rpc.DESCRIBE_DEADLINE_S)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from error

    def execute(self) -> WorkerSession:
        """Start an Execute stream."""
        channel = self._channel.current()
        call = channel.stream_stream(
            "/shardmesh.v1.ShardWorker/Execute",
            # Requests come serialized: the same bytes go to all shards.
            request_serializer=None,
            # Responses are parsed by whoever counts their bytes.
            response_deserializer=None,
        )
        return WorkerSession(self.address, call(), channel)

    async def close(self) -> None:
        """Close the channel; running calls are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        """Use as a context that closes the channel."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the channel."""
        await self.close()

    def _stub(self) -> shardworker_pb2_grpc.ShardWorkerStub:
        return shardworker_pb2_grpc.ShardWorkerStub(self._channel.current())

    @property
    def _name(self) -> str:
        return f"worker {self.address}"

    def _error(self, error: grpc.aio.AioRpcError) -> MeshError:
        return from_rpc_error(error, self._name)


class WorkerSession:
    """One Execute stream. A write and a read belong together; the caller sets the deadline."""

    def __init__(self, address: str, call: grpc.aio.StreamStreamCall, channel: grpc.aio.Channel) -> None:
        """Wrap a started call, and keep its channel."""
        self.address = address
        self._call = call
        self._channel = channel

    async def write(self, request: bytes) -> None:
        """Send one serialized `ExecuteRequest`.

        Raises:
            WorkerLost: the stream is broken.

        """
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            raise self._lost(error) from error

    async def read(self) -> bytes:
        """Receive the next serialized `ExecuteResponse`.

        Raises:
            WorkerLost: the stream is broken.

        """
        try:
            response = await self._call.read()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
            raise self._lost(error) from error
        if response is grpc.aio.EOF:
            raise WorkerLost(f"worker {self.address} ended its session")
        return response  # type: ignore[no-any-return]

    async def wait_ended(self) -> str:
        """Wait until the stream is over, whoever ended it; say how."""
        code = await self._call.code()
        return f"the session ended ({code.name}: {await self._call.details() or 'no more is known'})"

    def cancel(self) -> None:
        """End the stream; the worker frees its KV."""
        self._call.cancel()

    def _lost(self, error: Exception) -> MeshError:
        if isinstance(error, grpc.aio.AioRpcError):
            return from_rpc_error(error, f"worker {self.address}")
        return WorkerLost(f"worker {self.address}: the session is over")
