"""Workers by the EndpointSlices of a Kubernetes Service, which should be headless.

Ready or not: a worker is of use as soon as it listens, which the coordinator finds out itself, and becomes ready when it holds a
shard, which only the coordinator can bring about. So endpoints that are not ready count, with and without the Service's
`publishNotReadyAddresses`; those that terminate do not, for their pods are told to go: what they serve goes on until it breaks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog

from coordinator.discovery.dns import show_address
from coordinator.discovery.watch import ObjectWatch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from coordinator.discovery.api import Json
    from coordinator.discovery.target import ServiceTarget

log = structlog.get_logger(__name__)

SERVICE_LABEL = "kubernetes.io/service-name"
# Kubernetes 1.21 and later have v1.
_VERSIONS = ("v1", "v1beta1")


class EndpointSliceSource:
    """The endpoints of one Service."""

    def __init__(self, target: ServiceTarget, watch: ObjectWatch | None = None) -> None:
        """Ask nothing yet.

        Args:
            target: the Service.
            watch: of its slices; None: through the API server of this pod, or of KUBECONFIG.

        """
        self._target = target
        self._watch = watch or ObjectWatch(self._paths, f"{SERVICE_LABEL}={target.service}")

    async def addresses(self) -> AsyncGenerator[tuple[str, ...]]:
        """See `WorkerSource.addresses`.

        Raises:
            InvalidArgument: nothing says where the API server is.

        """
        known: tuple[str, ...] | None = None
        async for slices in self._watch.snapshots():
            found = read_addresses(slices, self._target.port)
            if found != known:
                if not found:
                    log.warning("no workers behind this Service", service=self._target.service, port=self._target.port)
                known = found
                yield found

    def _paths(self, namespace: str) -> list[str]:
        namespace = self._target.namespace or namespace
        return [f"/apis/discovery.k8s.io/{version}/namespaces/{namespace}/endpointslices" for version in _VERSIONS]


def read_addresses(slices: Iterable[Json], port: int | str) -> tuple[str, ...]:
    """Give one address for each pod, in the order of the pods' names.

    Args:
        slices: EndpointSlice objects.
        port: a number, or the name of a port in the slices.

    """
    # A Service of both families has a slice of each; the same endpoint may be in two slices while they are rearranged.
    found: dict[str, str] = {}
    for one in sorted(slices, key=lambda one: (one.get("addressType", ""), one["metadata"]["name"])):
        number = port if isinstance(port, int) else _number(one, port)
        for endpoint in one.get("endpoints") or ():
            addresses = endpoint.get("addresses")
            if number and addresses and not (endpoint.get("conditions") or {}).get("terminating"):
                # All addresses of an endpoint are of the same pod.
                found.setdefault(_pod(endpoint) or addresses[0], show_address(addresses[0], number))
    return tuple(found[pod] for pod in sorted(found, key=lambda pod: (len(pod), pod)))


def _number(one: Json, name: str) -> int | None:
    return next((port.get("port") for port in one.get("ports") or () if port.get("name") == name), None)


def _pod(endpoint: Any) -> str | None:  # noqa: ANN401  # JSON
    name = (endpoint.get("targetRef") or {}).get("name")
    return str(name) if name else None
