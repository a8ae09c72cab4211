"""Stands between a coordinator and one worker, reads their rounds, and does what a test wants at an exact moment of a step.

Every other call is passed on as it is. Messages are handed on as the bytes that came, unless a test changes one.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import grpc

from coordinator.microbatches import LIMIT
from protos import rpc
from protos.shardworker_pb2 import ExecuteRequest, ExecuteResponse, LoadRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_UNLIMITED = 2**30
_EXECUTE = "/shardmesh.v1.ShardWorker/Execute"
_LOAD = "/shardmesh.v1.ShardWorker/Load"
_SUPPLY = "/shardmesh.v1.ShardWorker/Supply"


class When(enum.Enum):
    """Where in a round something happens."""

    BEFORE = "before"
    """The request has come, and the worker has not seen it."""
    WITHIN = "within"
    """The worker has the request, and may be computing."""
    AFTER = "after"
    """The answer is there, and the coordinator has not seen it."""


class Stage(enum.Enum):
    """How far a worker has come on its way into another mesh."""

    ASKED = "asked"
    """The request to load has come, and the worker has not seen it; it may be changed."""
    LOADING = "loading"
    """The worker has that request."""
    LOADED = "loaded"
    """It has answered it: of a small plan, all is in place."""
    OPENING = "opening"
    """A session is asked for, and the worker has not seen that."""
    PROVING = "proving"
    """Likewise the first round of a session."""


Act = Callable[[Any], bytes | None]


_FIRST_ROUNDS = (Stage.OPENING, Stage.PROVING)


@dataclass(frozen=True)
class Moment:
    """A point of a step."""

    step: int
    """Counted from 0 since the proxy began to count."""
    action: str = "attend"
    """Field name in `ExecuteRequest`."""
    layer: int = 0
    """Of the head: 0."""
    when: When = When.BEFORE

    def __str__(self) -> str:
        """Name it, for people."""
        return f"{self.when.value}-{self.action}-{self.layer}-of-step-{self.step}"


@dataclass(eq=False)
class Trap:
    """What shall happen at a moment, once."""

    moment: Moment
    act: Act
    """Called with the request, or with the answer if that is there; may change what is handed on, or give other bytes for it."""
    sprung: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it has happened."""


class WorkerProxy(grpc.GenericRpcHandler):
    """A worker's service, passed through."""

    def __init__(self, listen: str, target: str) -> None:
        """Describe it; entering the context makes it.

        Args:
            listen: address of the proxy.
            target: address of the worker.

        """
        self.on_load: Callable[[], object] | None = None
        """Done once, at the first sign of progress of the next load."""
        self.at_stage: dict[Stage, Callable[[Any], object]] = {}
        """Done once each, with the request, when the worker gets so far next."""
        self._listen, self._target = listen, target
        self._traps: list[Trap] = []
        self._steps: dict[tuple[int, int], int] = {}
        self._channel = self._connect()
        self._server = grpc.aio.server(options=rpc.server_options(max_send_bytes=_UNLIMITED, max_receive_bytes=_UNLIMITED))
        self._server.add_generic_rpc_handlers((self,))

    @property
    def num_steps(self) -> int:
        """Steps since counting began."""
        return len(self._steps)

    def count_from_here(self) -> None:
        """Begin to count steps at 0."""
        self._steps.clear()

    def at(self, moment: Moment, act: Act) -> asyncio.Event:
        """Lay a trap; the event is set when it has sprung."""
        trap = Trap(moment, act)
        self._traps.append(trap)
        return trap.sprung

    def clear(self) -> None:
        """Take up all traps."""
        self._traps.clear()
        self.at_stage.clear()
        self.on_load = None

    async def reconnect(self) -> None:
        """Forget that the worker could not be reached a moment ago."""
        old, self._channel = self._channel, self._connect()
        await old.close()

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server.add_insecure_port(self._listen)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self._server.stop(None)
        await self._channel.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Give the handler of any method."""
        method = handler_call_details.method
        if method == _EXECUTE:
            return grpc.stream_stream_rpc_method_handler(self._execute)

        async def pass_through(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            # On the wire calls with one message are streams, too.
            call = self._channel.stream_stream(method)()
            write_all = self._write_load if method == _LOAD else _write_all
            writing = asyncio.create_task(write_all(requests, call))
            try:
                if method == _SUPPLY:
                    # By which the worker says that it takes the offer, long before it asks for anything.
                    await context.send_initial_metadata(tuple(await call.initial_metadata()))
                while (answer := await call.read()) is not grpc.aio.EOF:
                    if method == _LOAD:
                        self._reach(Stage.LOADED)
                        if self.on_load:
                            act, self.on_load = self.on_load, None
                            act()
                    yield answer
            except grpc.aio.AioRpcError as error:
                await _pass_on(context, error)
            finally:
                await _end(call, writing)

        return grpc.stream_stream_rpc_method_handler(pass_through)

    async def _execute(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        call = self._channel.stream_stream(_EXECUTE)()
        asked: asyncio.Queue[ExecuteRequest] = asyncio.Queue()
        writing = asyncio.create_task(self._hand_on(requests, call, asked))
        try:
            while (answer := await call.read()) is not grpc.aio.EOF:
                request = await asked.get()
                for trap in self._springing(request, When.AFTER):
                    answer = _spring(trap, ExecuteResponse.FromString(answer))
                yield answer
        except grpc.aio.AioRpcError as error:
            await _pass_on(context, error)
        finally:
            await _end(call, writing)

    async def _write_load(self, requests: AsyncIterator[bytes], call: grpc.aio.StreamStreamCall) -> None:
        async for data in requests:
            request = LoadRequest.FromString(data)
            self._reach(Stage.ASKED, request)
            await call.write(request.SerializeToString())
            self._reach(Stage.LOADING, request)
        await call.done_writing()

    def _reach(self, stage: Stage, request: Any = None) -> None:
        """Take note that the worker has come so far."""
        if act := self.at_stage.pop(stage, None):
            act(request)

    async def _hand_on(
        self, requests: AsyncIterator[bytes], call: grpc.aio.StreamStreamCall, asked: asyncio.Queue[ExecuteRequest]
    ) -> None:
        async for data in requests:
            request = ExecuteRequest.FromString(data)
            if request.round <= len(_FIRST_ROUNDS):
                self._reach(_FIRST_ROUNDS[request.round - 1], request)
            if request.WhichOneof("action") != "open":
                self._steps.setdefault((request.epoch, request.step // LIMIT), len(self._steps))
            for trap in self._springing(request, When.BEFORE):
                data = _spring(trap, request)  # noqa: PLW2901  # as changed
            asked.put_nowait(request)
            await call.write(data)
            for trap in self._springing(request, When.WITHIN):
                _spring(trap, request)
        await call.done_writing()

    def _springing(self, request: ExecuteRequest, when: When) -> list[Trap]:
        """Take up the traps whose moment is now."""
        if not self._traps or request.WhichOneof("action") == "open":
            return []
        action = request.WhichOneof("action")
        step = self._steps.get((request.epoch, request.step // LIMIT), 0)
        now = Moment(step, action, getattr(getattr(request, action), "layer", 0), when)
        sprung = [trap for trap in self._traps if trap.moment == now]
        self._traps = [trap for trap in self._traps if trap not in sprung]
        return sprung

    def _connect(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(
            self._target, options=rpc.channel_options(max_send_bytes=_UNLIMITED, max_receive_bytes=_UNLIMITED)
        )


def _spring(trap: Trap, message: ExecuteRequest | ExecuteResponse) -> bytes:
    """Do what shall happen, and give the message to hand on."""
    other = trap.act(message)
    trap.sprung.set()
    return message.SerializeToString() if other is None else other


async def _write_all(requests: AsyncIterator[bytes], call: grpc.aio.StreamStreamCall) -> None:
    async for request in requests:
        await call.write(request)
    await call.done_writing()


async def _end(call: grpc.aio.StreamStreamCall, writing: asyncio.Task[None]) -> None:
    writing.cancel()
    call.cancel()
    await asyncio.gather(writing, return_exceptions=True)


async def _pass_on(context: grpc.aio.ServicerContext, error: grpc.aio.AioRpcError) -> None:
    """End a call as the worker ended it."""
    await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
