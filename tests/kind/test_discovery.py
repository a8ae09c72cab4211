"""Discovery and a real API server: pods that come and go, and a history that is over."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

import pytest
from structlog.testing import capture_logs

from coordinator.discovery.api import Json, KubernetesApi
from coordinator.discovery.endpoint_slices import SERVICE_LABEL, EndpointSliceSource
from coordinator.discovery.target import ServiceTarget
from coordinator.discovery.watch import ObjectWatch
from tests.faults.waiting import wait_until
from tests.kind.cluster import Namespace, apply, kubectl, poll
from tests.kind.release import NAME, Release

pytestmark = [pytest.mark.kind, pytest.mark.timeout(600)]

CHANGE_S = 90.0
ANSWER_S = 15.0
ANCIENT = "1"
"""A version from before anything that a test makes."""


class Follower:
    """What a source of addresses said last."""

    def __init__(self, source: EndpointSliceSource) -> None:
        self.seen: list[tuple[str, ...]] = []
        self._source = source

    async def follow(self) -> None:
        async with aclosing(self._source.addresses()) as found:
            async for addresses in found:
                self.seen.append(addresses)

    @property
    def last(self) -> set[str]:
        return set(self.seen[-1]) if self.seen else set()


def worker_addresses(release: Release) -> set[str]:
    return {f"{pod['status']['podIP']}:7001" for pod in release.pods("worker")}


async def test_workers_come_and_go_as_their_pods_do(release: Release) -> None:
    before = worker_addresses(release)
    follower = Follower(EndpointSliceSource(ServiceTarget(release.namespace.name, f"{NAME}-workers", 7001)))
    following = asyncio.create_task(follower.follow())
    await wait_until("the addresses of all workers", lambda: follower.last == before, ANSWER_S)
    victim = min(release.pods("worker"), key=lambda pod: pod["metadata"]["name"])
    gone = f"{victim['status']['podIP']}:7001"
    await asyncio.to_thread(release.namespace.kubectl, "delete", "pod", victim["metadata"]["name"], "--wait=false")
    await wait_until("a worker to go", lambda: gone not in follower.last, CHANGE_S)
    await wait_until("another to come", lambda: len(follower.last) == len(before), CHANGE_S)
    await asyncio.to_thread(release.wait_rolled_out)
    after = await asyncio.to_thread(worker_addresses, release)
    await wait_until("the addresses of all workers", lambda: follower.last == after, CHANGE_S)
    following.cancel()


class Forgetful(KubernetesApi):
    """A client that was away for so long, once, that what it knows is ancient."""

    was_away = False

    async def watch(self, path: str, query: Mapping[str, str]) -> AsyncGenerator[Json]:
        if not Forgetful.was_away:
            Forgetful.was_away = True
            query = {**query, "resourceVersion": ANCIENT}
        async with aclosing(super().watch(path, query)) as events:
            async for event in events:
                yield event


@dataclass(frozen=True)
class OwnSlices:
    """Objects like EndpointSlices, of a kind that was made just now: of what was before it no server knows anything."""

    namespace: Namespace

    @property
    def group(self) -> str:
        """Of the API."""
        return f"{self.namespace.name}.example.com"

    @property
    def path(self) -> str:
        """Of the list."""
        return f"/apis/{self.group}/v1/namespaces/{self.namespace.name}/endpointslices"

    def definition(self) -> Json:
        schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
        return {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"endpointslices.{self.group}"},
            "spec": {
                "group": self.group,
                "scope": "Namespaced",
                "names": {"kind": "EndpointSlice", "plural": "endpointslices"},
                "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
            },
        }

    def of(self, *addresses: str) -> Json:
        return {
            "apiVersion": f"{self.group}/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "one", "namespace": self.namespace.name, "labels": {SERVICE_LABEL: "own"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
            "ports": [{"name": "rounds", "port": 7001, "protocol": "TCP"}],
        }


@pytest.fixture
def slices(shared_release: Release) -> Iterator[OwnSlices]:
    own = OwnSlices(shared_release.namespace)
    name = f"customresourcedefinition/endpointslices.{own.group}"
    apply(own.definition())
    try:
        kubectl("wait", "--for=condition=Established", name, "--timeout=60s")
        poll("the new kind to be served", lambda: is_served(own.path), ANSWER_S)
        yield own
    finally:
        kubectl("delete", name, "--timeout=60s")


def is_served(path: str) -> bool:
    try:
        kubectl("get", f"--raw={path}")
    except AssertionError:
        return False
    return True


async def test_a_watch_survives_a_history_that_is_over(slices: OwnSlices) -> None:
    await asyncio.to_thread(apply, slices.of("192.0.2.1"))
    Forgetful.was_away = False
    watch = ObjectWatch(lambda _: [slices.path], f"{SERVICE_LABEL}=own", Forgetful.connect)
    follower = Follower(EndpointSliceSource(ServiceTarget(slices.namespace.name, "own", "rounds"), watch))
    with capture_logs() as logs:
        following = asyncio.create_task(follower.follow())
        await wait_until("the first address", lambda: follower.last == {"192.0.2.1:7001"}, ANSWER_S)
        await wait_until("410 Gone", lambda: "the watch's history is over: listing anew" in str(logs), ANSWER_S)
        await asyncio.to_thread(apply, slices.of("192.0.2.1", "192.0.2.2"))
        await wait_until("the second address", lambda: follower.last == {"192.0.2.1:7001", "192.0.2.2:7001"}, ANSWER_S)
        following.cancel()
