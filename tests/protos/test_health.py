"""The listener for probes: the same health as elsewhere, and nothing else."""

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos.errors import InvalidArgument
from protos.health import listen_for_probes

DEADLINE_S = 20


async def test_probes_see_the_health_that_others_see_and_nothing_else() -> None:
    checker = health.aio.HealthServicer()
    probes = await listen_for_probes("127.0.0.1:0", checker)
    try:
        async with grpc.aio.insecure_channel(probes.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest()
            assert (await stub.Check(request, timeout=DEADLINE_S)).status == health_pb2.HealthCheckResponse.SERVING
            await checker.enter_graceful_shutdown()
            assert (await stub.Check(request, timeout=DEADLINE_S)).status == health_pb2.HealthCheckResponse.NOT_SERVING
            for method in (
                "/shardmesh.v1.Generation/GetModel",
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            ):
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await channel.unary_unary(method)(b"", timeout=DEADLINE_S)
                assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await probes.stop()


async def test_a_taken_address_is_refused_and_a_socket_file_goes_with_the_listener(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/h"
    probes = await listen_for_probes(address, health.aio.HealthServicer())
    with pytest.raises(InvalidArgument, match="is in use"):
        await listen_for_probes(address, health.aio.HealthServicer())
    await probes.stop()
    assert not list(tmp_path.iterdir())
