"""Endpoints of a Service as an API server tells of them: what counts, and what a watch survives."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from coordinator.discovery import watch
from coordinator.discovery.api import WATCH_S
from coordinator.discovery.endpoint_slices import EndpointSliceSource, read_addresses
from coordinator.discovery.target import ServiceTarget
from protos.errors import InvalidArgument
from tests.coordinator.discovery.api_server import CUT, Answer, ApiServer, Asked, Stream, api_server, refusal, write_kubeconfig

PATH = "/apis/discovery.k8s.io/v1/namespaces/mesh/endpointslices"
BETA = PATH.replace("v1", "v1beta1", 1)


def endpoint(pod: int, *addresses: str, **more: Any) -> dict[str, Any]:
    return {
        "addresses": list(addresses) or [f"10.0.0.{pod}"],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "hostname": f"w-{pod}",
        "nodeName": "n1",
        "targetRef": {"kind": "Pod", "namespace": "mesh", "name": f"w-{pod}", "uid": f"u{pod}"},
        **more,
    }


def slice_of(*endpoints: dict[str, Any], name: str = "w-abc12", version: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "mesh", "resourceVersion": str(version)},
        "addressType": "IPv4",
        "endpoints": list(endpoints),
        "ports": [{"name": "grpc", "protocol": "TCP", "port": 7001}, {"name": "metrics", "protocol": "TCP", "port": 9100}],
        **more,
    }


def listing(*slices: dict[str, Any], version: int = 10) -> Answer:
    return Answer(body={"kind": "EndpointSliceList", "metadata": {"resourceVersion": str(version)}, "items": list(slices)})


def event(kind: str, changed: dict[str, Any]) -> bytes:
    return json.dumps({"type": kind, "object": changed}).encode() + b"\n"


def bookmark(version: int) -> bytes:
    return event("BOOKMARK", {"kind": "EndpointSlice", "metadata": {"resourceVersion": str(version), "creationTimestamp": None}})


GONE = refusal(410, "Expired", "too old resource version: 10 (812)")


@pytest.mark.parametrize(("port", "number"), [("grpc", 7001), ("metrics", 9100), (1234, 1234)])
def test_port_is_a_number_or_the_name_of_one(port: int | str, number: int) -> None:
    assert read_addresses([slice_of(endpoint(1))], port) == (f"10.0.0.1:{number}",)
    assert read_addresses([slice_of(endpoint(1), ports=None)], "grpc") == ()


def test_endpoints_that_are_not_ready_count_and_terminating_ones_do_not() -> None:
    conditions: list[dict[str, Any] | None] = [
        None,
        {},
        {"ready": False},
        {"ready": False, "serving": False, "terminating": None},
        {"ready": True, "serving": True, "terminating": True},
    ]
    found = read_addresses([slice_of(*(endpoint(pod, conditions=one) for pod, one in enumerate(conditions)))], 1)
    assert found == ("10.0.0.0:1", "10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1")


def test_a_pod_counts_once_in_however_many_slices_and_families_and_comes_in_the_order_of_the_names() -> None:
    slices = [
        slice_of(endpoint(10), endpoint(2), name="b"),
        slice_of(endpoint(2), endpoint(1), name="a"),
        slice_of(endpoint(1, "fd00::1"), endpoint(3, "fd00::3", "fd00::4"), name="6", addressType="IPv6"),
        slice_of(name="none", endpoints=None),
    ]
    wanted = ("10.0.0.1:1", "10.0.0.2:1", "[fd00::3]:1", "10.0.0.10:1")
    assert read_addresses(slices, 1) == wanted
    assert read_addresses(slices[::-1], 1) == wanted


def test_endpoints_that_are_no_pods_go_by_their_addresses() -> None:
    assert read_addresses([slice_of({"addresses": ["10.1.1.1"]}, {"addresses": ["10.1.1.2"]}, {"addresses": []})], 1) == (
        "10.1.1.1:1",
        "10.1.1.2:1",
    )


class Script:
    """Answers to lists and to watches, in their order; the last watch stays open."""

    def __init__(self, lists: list[Answer], watches: list[Stream | Answer]) -> None:
        self.lists, self.streams = lists, watches
        self.forever = asyncio.Event()

    def __call__(self, asked: Asked) -> Answer | Stream:
        if not asked.query.get("watch"):
            return self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
        return self.streams.pop(0) if self.streams else Stream([], self.forever)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_PAUSE_S", 0)


@pytest.fixture
def collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`await collect(count, answer)`: so many sets of addresses, and the server."""

    async def run(count: int, answer: Callable[[Asked], Answer | Stream]) -> tuple[list[tuple[str, ...]], ApiServer]:
        async with asyncio.timeout(20), api_server(answer) as server:
            write_kubeconfig(tmp_path / "config", server.address)
            monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
            async with aclosing(EndpointSliceSource(ServiceTarget(None, "w", "grpc")).addresses()) as addresses:
                return [await anext(addresses) for _ in range(count)], server

    return run


async def test_service_is_listed_and_watched_from_there(collect: Callable[..., Any]) -> None:
    changes = [event("MODIFIED", slice_of(endpoint(1), endpoint(2), version=11)), event("DELETED", slice_of(version=12))]
    found, server = await collect(3, Script([listing(slice_of(endpoint(1)))], [Stream(changes, asyncio.Event())]))
    assert found == [("10.0.0.1:7001",), ("10.0.0.1:7001", "10.0.0.2:7001"), ()]
    first, second = server.asked
    assert (first.method, first.path, first.query) == ("GET", PATH, {"labelSelector": "kubernetes.io/service-name=w"})
    assert first.headers["authorization"] == "Bearer t0ken"
    assert second.query == {
        "labelSelector": "kubernetes.io/service-name=w",
        "watch": "true",
        "allowWatchBookmarks": "true",
        "timeoutSeconds": str(WATCH_S),
        "resourceVersion": "10",
    }


async def test_half_lines_are_put_together_and_unknown_things_are_let_pass(collect: Callable[..., Any]) -> None:
    added = event("ADDED", slice_of(endpoint(2), name="other", version=11, newField={"deep": [1]}))
    chunks = [added[:7], added[7:60], added[60:] + b"\r\n", event("SOMETHING_NEW", {"a": 1}), bookmark(12)[:-1], b"\n"]
    removed = event("DELETED", slice_of(name="w-abc12", version=13))
    found, _ = await collect(
        3, Script([listing(slice_of(endpoint(1)))], [Stream([*chunks, removed[:20], removed[20:]], asyncio.Event())])
    )
    assert found == [("10.0.0.1:7001",), ("10.0.0.1:7001", "10.0.0.2:7001"), ("10.0.0.2:7001",)]


async def test_a_watch_that_the_server_ends_goes_on_where_bookmarks_say(collect: Callable[..., Any]) -> None:
    streams = [Stream([bookmark(20), bookmark(30)]), Stream([event("ADDED", slice_of(endpoint(2), name="o", version=31))])]
    found, server = await collect(2, Script([listing(slice_of(endpoint(1)))], streams))
    assert found[1] == ("10.0.0.1:7001", "10.0.0.2:7001")
    assert [query["resourceVersion"] for query in server.watches()[:2]] == ["10", "30"]
    assert sum(not asked.query.get("watch") for asked in server.asked) == 1


@pytest.mark.parametrize("gone", [Stream([event("ERROR", GONE)]), Answer(410, GONE)], ids=["event", "status"])
async def test_when_the_history_is_over_everything_is_listed_anew(collect: Callable[..., Any], gone: Stream | Answer) -> None:
    lists = [listing(slice_of(endpoint(1))), listing(slice_of(endpoint(2)), version=900)]
    with capture_logs() as lines:
        found, server = await collect(2, Script(lists, [gone]))
    assert found == [("10.0.0.1:7001",), ("10.0.0.2:7001",)]
    assert [line["log_level"] for line in lines] == ["info"]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (Stream([CUT]), "GET .*: "),
        (Stream([event("ADDED", slice_of(endpoint(3), name="x", version=11))[:30], CUT]), "GET .*: "),
        (Stream([event("ADDED", slice_of(endpoint(3), name="x", version=11))[:30]]), "ended as soon as it began"),
        (Stream([]), "ended as soon as it began"),
        (Stream([b"<html>proxy</html>\n"]), "Expecting value"),
        (Stream([event("ERROR", refusal(500, "InternalError", "etcdserver: request timed out"))]), "etcdserver: request timed"),
        (Stream([event("ERROR", {})]), "watch: "),
        (Stream([event("ADDED", {"metadata": {}})]), "an object without a name"),
        (Stream([b'"text"\n']), "watch: no event: text"),
        (Stream([b'{"code": 500}\n']), "watch: no event"),
        (Answer(403, refusal(403, "Forbidden", "endpointslices is forbidden: User x cannot watch")), "User x cannot watch"),
        (Answer(503, "overloaded"), "overloaded"),
    ],
)
async def test_a_broken_watch_is_logged_once_and_begun_anew(collect: Callable[..., Any], broken: Any, said: str) -> None:
    lists = [listing(slice_of(endpoint(1)))] * 3 + [listing(slice_of(endpoint(2)))]
    with capture_logs() as lines:
        found, _ = await collect(2, Script(lists, [broken] * 3))
    assert found == [("10.0.0.1:7001",), ("10.0.0.2:7001",)]
    warnings = [line["error"] for line in lines if line["log_level"] == "warning"]
    assert len(warnings) == 1
    assert re.search(said, warnings[0])


async def test_an_api_server_that_restarts_is_found_again_with_fresh_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    monkeypatch.setenv("KUBECONFIG", str(config))
    async with asyncio.timeout(20):
        source = EndpointSliceSource(ServiceTarget("other", "w", 1))
        async with aclosing(source.addresses()) as addresses:
            async with api_server(Script([listing(slice_of(endpoint(1)))], [])) as server:
                write_kubeconfig(config, server.address)
                assert await anext(addresses) == ("10.0.0.1:1",)
                assert server.asked[0].path == PATH.replace("mesh", "other")
            async with api_server(Script([listing(slice_of(endpoint(2)))], [])) as server:
                write_kubeconfig(config, server.address, "renewed")
                assert await anext(addresses) == ("10.0.0.2:1",)
                assert server.asked[0].headers["authorization"] == "Bearer renewed"


async def test_an_old_server_is_asked_for_what_it_has(collect: Callable[..., Any]) -> None:
    def answer(asked: Asked) -> Answer | Stream:
        if asked.path == PATH:
            return Answer(404, refusal(404, "NotFound", "the server could not find the requested resource"))
        return script(asked)

    script = Script([listing(slice_of(endpoint(1)))], [])
    found, server = await collect(1, answer)
    assert found == [("10.0.0.1:7001",)]
    assert [asked.path for asked in server.asked[:2]] == [PATH, BETA]


async def test_trouble_that_is_over_is_said_and_may_come_again(collect: Callable[..., Any]) -> None:
    trouble = Stream([event("ERROR", refusal(500, "InternalError", "no leader"))])
    lists = [listing(slice_of(endpoint(1)))] * 3 + [listing(slice_of(endpoint(2)))]
    with capture_logs() as lines:
        await collect(2, Script(lists, [trouble, trouble, Stream([bookmark(20), *trouble.chunks])]))
    assert [line.get("error") for line in lines] == ["watch: no leader", None, "watch: no leader"]


async def test_service_without_endpoints_is_said(collect: Callable[..., Any]) -> None:
    with capture_logs() as lines:
        found, _ = await collect(1, Script([listing()], []))
    assert found == [()]
    assert [line["event"] for line in lines] == ["no workers behind this Service"]


async def test_nothing_that_says_where_the_server_is_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(InvalidArgument, match="the Kubernetes API cannot be reached: there is no file"):
        await anext(EndpointSliceSource(ServiceTarget(None, "w", 1)).addresses())


async def test_a_file_that_says_nothing_of_a_server_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("a: b")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(InvalidArgument, match="the Kubernetes API cannot be reached: Invalid kube-config file"):
        await anext(EndpointSliceSource(ServiceTarget(None, "w", 1)).addresses())


async def test_a_silent_server_is_given_up(collect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.discovery.api.WATCH_S", 0)
    monkeypatch.setattr("coordinator.discovery.api.REQUEST_S", 0.2)
    lists = [listing(slice_of(endpoint(1))), listing(slice_of(endpoint(2)))]
    with capture_logs() as lines:
        found, _ = await collect(2, Script(lists, []))
    assert found[1] == ("10.0.0.2:7001",)
    assert "no end within 0.2 s" in lines[0]["error"]


def test_pauses_grow_to_a_bound_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "FIRST_PAUSE_S", 0.5)
    backoff = watch.Backoff()
    pauses = [backoff.next_s() for _ in range(12)]
    assert 0.25 <= pauses[0] <= 0.5
    assert all(0.25 * 2**number <= pause <= 0.5 * 2**number for number, pause in enumerate(pauses[:6]))
    assert all(15 <= pause <= 30 for pause in pauses[7:])
    assert len(set(pauses)) > 6
    backoff.reset()
    assert backoff.next_s() <= 0.5
