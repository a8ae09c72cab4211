"""What `--discover` and `--lease` say, checked before anything is asked. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from protos import rpc
from protos.errors import InvalidArgument

_FORMS = "dns:NAME:PORT or kubernetes:[NAMESPACE/]SERVICE:PORT"

# RFC 1123 labels, as Kubernetes demands them of namespaces and services; a Lease may have dots in its name.
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SERVICE = re.compile(
    rf"((?P<namespace>{_LABEL})/)?(?P<service>{_LABEL}):(?P<port>[0-9]{{1,5}}|[a-z0-9]([-a-z0-9]{{0,13}}[a-z0-9])?)"
)
_LEASE = re.compile(rf"(?P<namespace>{_LABEL})/(?P<name>{_LABEL}(\.{_LABEL})*)")
_MAX_NAME = 253
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class DnsTarget:
    """All addresses of a name."""

    name: str
    port: int


@dataclass(frozen=True, slots=True)
class ServiceTarget:
    """All endpoints of a Kubernetes Service."""

    namespace: str | None
    """None: the one that the coordinator is in."""
    service: str
    port: int | str
    """A number, or the name of a port of the Service."""


@dataclass(frozen=True, slots=True)
class LeaseTarget:
    """A `coordination.k8s.io` Lease."""

    namespace: str
    name: str


def read_target(text: str) -> DnsTarget | ServiceTarget:
    """Read where workers are to be found.

    Raises:
        InvalidArgument: neither form, or a part of it cannot be a name or a port.

    """
    kind, _, rest = text.partition(":")
    if kind == "dns":
        name, _, port = rpc.check_address(rest, insecure=True).rpartition(":")
        if name and port != "0" and not name.startswith("unix"):
            return DnsTarget(name.strip("[]"), int(port))
    if kind == "kubernetes" and (match := _SERVICE.fullmatch(rest)):
        port = match["port"]
        if not port.isdecimal():
            return ServiceTarget(match["namespace"], match["service"], port)
        if 0 < int(port) <= _MAX_PORT:
            return ServiceTarget(match["namespace"], match["service"], int(port))
    raise InvalidArgument(f"--discover {text}: wanted {_FORMS}")


def read_lease(text: str) -> LeaseTarget:
    """Read which Lease is meant.

    Raises:
        InvalidArgument: not NAMESPACE/NAME.

    """
    match = _LEASE.fullmatch(text)
    if not match or len(match["name"]) > _MAX_NAME:
        raise InvalidArgument(f"--lease {text}: wanted NAMESPACE/NAME of a coordination.k8s.io Lease")
    return LeaseTarget(match["namespace"], match["name"])
