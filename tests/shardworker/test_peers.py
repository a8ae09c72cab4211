"""Whom a worker obeys: by the DNS names of a certificate, and by nothing else of it."""

from typing import Any

import pytest

from protos.errors import Forbidden
from shardworker.peers import admit_coordinators

METHODS = [f"/shardmesh.v1.ShardWorker/{name}" for name in ("Describe", "Load", "Execute", "Release", "Warm")]
OPEN = ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.reflection.v1alpha.ServerReflection/X"]


class Context:
    def __init__(self, **properties: list[bytes]) -> None:
        self.properties = properties

    def auth_context(self) -> dict[str, list[bytes]]:
        return self.properties


COORDINATOR = Context(peer_dns=[b"localhost", b"coordinator.shardmesh"])
OTHERS = [
    Context(),
    Context(peer_dns=[b"shardworker.shardmesh"]),
    Context(peer_dns=[b"coordinator.shardmesh.example", b"x.coordinator.shardmesh", b"*.shardmesh", b"\xff"]),
    Context(x509_common_name=[b"coordinator.shardmesh"], x509_subject_alternative_name=[b"coordinator.shardmesh"]),
    Context(peer_uri=[b"coordinator.shardmesh"], peer_email=[b"coordinator.shardmesh"]),
]


@pytest.mark.parametrize("method", METHODS + OPEN)
def test_a_coordinator_may_do_everything(method: str) -> None:
    with admit_coordinators(method, COORDINATOR):
        pass


@pytest.mark.parametrize("context", OTHERS)
@pytest.mark.parametrize("method", [*METHODS, "/grpc.health.v1.HealthX/Check", "/other.Service/Method"])
def test_others_may_do_nothing_to_a_worker(method: str, context: Any) -> None:
    with pytest.raises(Forbidden, match=r"wanted a certificate for the DNS name coordinator.shardmesh, found one for "):
        admit_coordinators(method, context)


@pytest.mark.parametrize("context", OTHERS)
@pytest.mark.parametrize("method", OPEN)
def test_others_may_ask_how_it_is(method: str, context: Any) -> None:
    with admit_coordinators(method, context):
        pass
