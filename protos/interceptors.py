"""Server side of the error table: a raised `MeshError` becomes a status; nothing else ever reaches a caller as a traceback."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError

from protos.errors import InvalidArgument, MeshError, to_status

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

log = structlog.get_logger(__name__)


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns errors raised by servicers, and messages that cannot be parsed, into canonical statuses."""

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
                guard = _guard_stream if inspect.isasyncgenfunction(behavior) else _guard_unary
                replaced[kind] = guard(behavior)
        return handler._replace(**replaced)


def _parse_or_error(parse: Callable[[bytes], Any], data: bytes) -> Any:  # noqa: ANN401  # any message, or what is wrong with it
    try:
        return parse(data)
    except DecodeError as error:
        return InvalidArgument(f"the request is not a valid message: {error}")


def _checked(request: Any) -> Any:  # noqa: ANN401  # a message, what is wrong with it, or a stream of either
    if isinstance(request, MeshError):
        raise request
    return _checked_stream(request) if hasattr(request, "__aiter__") else request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


async def _abort(context: grpc.aio.ServicerContext, error: Exception) -> None:
    if not isinstance(error, MeshError):
        log.error("servicer failed", error=repr(error), exc_info=error)
        error = MeshError("internal error; the server's log has the details")
    await context.abort_with_status(to_status(error))


def _guard_unary(behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: ANN401  # any message
        try:
            return await behavior(_checked(request), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  # the edge: everything becomes a status
            await _abort(context, error)

    return guarded


def _guard_stream(behavior: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncIterator[Any]]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:  # noqa: ANN401  # any message
        try:
            async with contextlib.aclosing(behavior(_checked(request), context)) as responses:
                async for response in responses:
                    yield response
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001  # the edge: everything becomes a status
            await _abort(context, error)

    return guarded
