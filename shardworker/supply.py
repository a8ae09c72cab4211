"""The coordinator as the source of a checkpoint's bytes: asked in the device's thread, answered on the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc

from protos import rpc
from protos import shardworker_pb2 as pb
from protos.errors import InvalidArgument, MeshError, ModelError, PlanMismatch

if TYPE_CHECKING:
    from shardworker.source import Pieces


class Supply:
    """One Supply call, while it lasts; a `shardworker.source.Supplier`."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        """Take over a call whose offer was read."""
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._number = 0
        self._over = self._loop.create_future()

    def read(self, file: str, pieces: Pieces) -> bytes:
        """Ask for pieces of a file and wait for them; not on the event loop.

        Raises:
            ModelError: the coordinator has no such bytes, sends something else, or is silent.
            PlanMismatch: it has gone.

        """
        return asyncio.run_coroutine_threadsafe(self._ask(file, pieces), self._loop).result()

    async def wait_over(self) -> None:
        """Wait until `close`."""
        await asyncio.shield(self._over)

    def close(self) -> None:
        """Answer no more: the load is over. Idempotent."""
        if not self._over.done():
            self._over.set_result(None)

    async def _ask(self, file: str, pieces: Pieces) -> bytes:
        if self._over.done():
            raise _gone(file)
        self._number += 1
        wanted = pb.SupplyResponse(
            number=self._number,
            file=file,
            offset=pieces.offset,
            length=pieces.length,
            count=pieces.number,
            pitch=pieces.pitch,
        )
        exchange = asyncio.ensure_future(self._exchange(wanted))
        await asyncio.wait([exchange, self._over], timeout=rpc.SUPPLY_SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if exchange.done():
            return self._checked(exchange.result(), file)
        exchange.cancel()
        if self._over.done():
            raise _gone(file)
        raise ModelError(f"checkpoint file {file}: the coordinator sent nothing for {rpc.SUPPLY_SILENCE_S:g} s")

    async def _exchange(self, wanted: pb.SupplyResponse) -> pb.SupplyRequest:
        try:
            await self._context.write(wanted)
            answer: pb.SupplyRequest = await self._context.read()
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            answer = grpc.aio.EOF
        return answer

    def _checked(self, answer: pb.SupplyRequest, file: str) -> bytes:
        if answer is grpc.aio.EOF:
            raise _gone(file)
        # What the interceptor could not parse.
        if isinstance(answer, MeshError):
            raise ModelError(f"checkpoint file {file}: {answer}")
        if answer.WhichOneof("message") != "bytes" or answer.bytes.number != self._number:
            raise ModelError(f"checkpoint file {file}: the coordinator answered something else than number {self._number}")
        if answer.bytes.error:
            raise ModelError(answer.bytes.error)
        return answer.bytes.data


def _gone(file: str) -> PlanMismatch:
    # Nothing is wrong with the files: whoever waits for the same load begins anew.
    return PlanMismatch(f"the load was given up: the coordinator that sent checkpoint file {file} has gone")


def check_offer(request: pb.SupplyRequest) -> pb.SupplyOffer:
    """Give the offer with which a call begins.

    Raises:
        InvalidArgument: it begins with something else.

    """
    if request is grpc.aio.EOF or request.WhichOneof("message") != "offer":
        raise InvalidArgument("the first message of Supply is `offer`")
    return request.offer
