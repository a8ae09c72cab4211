"""What --discover and --lease may say."""

import pytest

from coordinator.discovery.target import DnsTarget, LeaseTarget, ServiceTarget, read_lease, read_target
from protos.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("dns:workers:7001", DnsTarget("workers", 7001)),
        ("dns:workers.mesh.svc.cluster.local.:1", DnsTarget("workers.mesh.svc.cluster.local.", 1)),
        ("dns:10.0.0.1:7001", DnsTarget("10.0.0.1", 7001)),
        ("dns:[fd00::1]:7001", DnsTarget("fd00::1", 7001)),
        ("kubernetes:workers:7001", ServiceTarget(None, "workers", 7001)),
        ("kubernetes:mesh/my-workers:grpc", ServiceTarget("mesh", "my-workers", "grpc")),
        ("kubernetes:mesh/w:65535", ServiceTarget("mesh", "w", 65535)),
    ],
)
def test_target_is_read(text: str, target: DnsTarget | ServiceTarget) -> None:
    assert read_target(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "",
        "workers:7001",
        "dns:workers",
        "dns::1",
        "dns:workers:0",
        "dns:workers:65536",
        "dns:unix:/tmp/x",
        "dns:a b:1",
        "kubernetes:workers",
        "kubernetes:workers:",
        "kubernetes:workers:0",
        "kubernetes:workers:65536",
        "kubernetes:a/b/c:1",
        "kubernetes:/w:1",
        "kubernetes:W:1",
        "kubernetes:-w:1",
        "kubernetes:w/../../secrets:1",
        "kubernetes:w:GRPC",
        f"kubernetes:{'w' * 64}:1",
    ],
)
def test_what_is_no_target_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"wanted dns:NAME:PORT|neither HOST:PORT"):
        read_target(text)


def test_lease_is_read() -> None:
    assert read_lease("mesh/my.plan") == LeaseTarget("mesh", "my.plan")


@pytest.mark.parametrize("text", ["", "plan", "mesh/", "/plan", "mesh/a/b", "mesh/A", "mesh/..", f"mesh/{'a.' * 126}aa"])
def test_what_is_no_lease_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="wanted NAMESPACE/NAME"):
        read_lease(text)
