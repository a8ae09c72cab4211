"""The edge of a server: who may call, and what an error becomes.

A raised `MeshError` becomes a status; nothing else ever reaches a caller as a traceback.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import structlog
from google.protobuf.message import DecodeError

from protos.errors import InvalidArgument, MeshError, to_status
from protos.log import frames

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    _GuardOfMethod = Callable[[grpc.aio.ServicerContext], contextlib.AbstractContextManager[None]]

log = structlog.get_logger(__name__)


class Guard(Protocol):
    """Entered before the servicer sees a call, left when the call has ended."""

    def __call__(self, method: str, context: grpc.aio.ServicerContext) -> contextlib.AbstractContextManager[None]:
        """Make the context of one call; entering it raises a `MeshError` if the call is not allowed.

        Args:
            method: its full name, `/package.Service/Method`.
            context: for the peer's certificate and metadata.

        """


def admit_all(method: str, context: grpc.aio.ServicerContext) -> contextlib.AbstractContextManager[None]:
    """Guard of a server whose address is protection enough, or that was told to be open."""
    del method, context
    return contextlib.nullcontext()


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns errors raised by guard and servicers, and messages that cannot be parsed, into canonical statuses."""

    def __init__(self, guard: Guard = admit_all) -> None:
        """Put `guard` around each call."""
        self._guard = guard

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        parse = handler.request_deserializer
        replaced: dict[str, Any] = {"request_deserializer": lambda data: _parse_or_error(parse, data)}
        for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            if behavior := getattr(handler, kind):
                wrap = _wrap_stream if inspect.isasyncgenfunction(behavior) else _wrap_unary
                receive = _stream_of if handler.request_streaming else _only
                # gRPC itself never answers a call that ends before its one message, so all are received as streams.
                replaced[kind] = None
                replaced[kind.replace("unary_", "stream_", 1)] = wrap(
                    behavior, functools.partial(self._guard, handler_call_details.method), receive
                )
        return handler._replace(request_streaming=True, **replaced)


def _parse_or_error(parse: Callable[[bytes], Any], data: bytes) -> Any:  # noqa: ANN401  # any message, or what is wrong with it
    try:
        return parse(data)
    except DecodeError as error:
        return InvalidArgument(f"the request is not a valid message: {error}")


async def _only(requests: AsyncIterator[Any]) -> Any:  # noqa: ANN401  # any message
    """Receive the message of a call that has one."""
    async for request in _checked(requests):
        return request
    raise InvalidArgument("the call ended without its message")


async def _stream_of(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Leave it to the servicer to receive."""
    return _checked(requests)


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, MeshError):
            raise request
        yield request


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    if not isinstance(error, MeshError):
        log.error("servicer failed", error=type(error).__name__, frames=frames(error))
        error = MeshError("internal error; the server's log has the details")
    await context.abort_with_status(to_status(error))


def _wrap_unary(
    behavior: Callable[..., Awaitable[Any]], guard: _GuardOfMethod, receive: Callable[[AsyncIterator[Any]], Awaitable[Any]]
) -> Callable[..., Awaitable[Any]]:
    async def guarded(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> Any:  # noqa: ANN401  # any message
        try:
            with guard(context):
                return await behavior(await receive(requests), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  # the edge: everything becomes a status
            await _abort(context, error)

    return guarded


def _wrap_stream(
    behavior: Callable[..., AsyncGenerator[Any, None]],
    guard: _GuardOfMethod,
    receive: Callable[[AsyncIterator[Any]], Awaitable[Any]],
) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        try:
            with guard(context):
                async with contextlib.aclosing(behavior(await receive(requests), context)) as responses:
                    async for response in responses:
                        yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  # the edge: everything becomes a status
            await _abort(context, error)

    return guarded
