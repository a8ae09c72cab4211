"""A call that is silent for long is not ended for its pings: the two ends' settings fit gRPC's rule.

The rule (gRPC's A8 and its C core): a server that sends nothing counts each ping that comes sooner after the last one than it
wants, and closes the connection with too_many_pings at the third.
"""

import asyncio
from pathlib import Path

import grpc
import pytest

from protos import rpc

LIMITS = {"max_send_bytes": 1000, "max_receive_bytes": 1000}
# gRPC's clients ping once a second at most: all times are scaled to that, and the call lasts for more pings than break the rule.
SCALE = 20
SILENCE_S = 7.0
TIMES = ("grpc.keepalive_time_ms", "grpc.http2.min_ping_interval_without_data_ms")


def scaled(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return [(name, value // SCALE if name in TIMES else value) for name, value in options]


async def silent_call(path: Path, client: list[tuple[str, int]], server: list[tuple[str, int]], silence_s: float) -> bytes:
    async def answer(request: bytes, _: grpc.aio.ServicerContext) -> bytes:
        await asyncio.sleep(silence_s)
        return request

    listener = grpc.aio.server(options=server)
    handler = grpc.unary_unary_rpc_method_handler(answer)
    listener.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Unary": handler}),))
    listener.add_insecure_port(f"unix:{path}")
    await listener.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{path}", options=client) as channel:
            response: bytes = await channel.unary_unary("/test.Test/Unary")(b"x", timeout=silence_s + 20)
            return response
    finally:
        await listener.stop(None)


def test_the_client_pings_half_as_often_as_the_server_allows() -> None:
    client, server = dict(rpc.channel_options(**LIMITS)), dict(rpc.server_options(**LIMITS))
    assert client["grpc.keepalive_time_ms"] >= 2 * server["grpc.http2.min_ping_interval_without_data_ms"]
    # Both ends: else a connection without calls may be pinged only every two hours.
    assert client["grpc.keepalive_permit_without_calls"] == server["grpc.keepalive_permit_without_calls"] == 1
    # The client's own limit of pings without data would end its pings instead.
    assert client["grpc.http2.max_pings_without_data"] == 0


async def test_a_silent_call_ends_well_and_would_not_where_the_server_allows_less(tmp_path: Path) -> None:
    client, server = rpc.channel_options(**LIMITS), rpc.server_options(**LIMITS)
    results = await asyncio.gather(
        silent_call(tmp_path / "ours", scaled(client), scaled(server), SILENCE_S),
        silent_call(tmp_path / "less", scaled(client), server, SILENCE_S),
        return_exceptions=True,
    )
    assert results[0] == b"x"
    assert isinstance(results[1], grpc.aio.AioRpcError), "so few pings break no rule"
    assert results[1].details() == "Too many pings"


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_call_that_is_silent_for_five_minutes_ends_well(tmp_path: Path) -> None:
    client, server = rpc.channel_options(**LIMITS), rpc.server_options(**LIMITS)
    assert await silent_call(tmp_path / "s", client, server, 300.0) == b"x"
