"""Coordinators that compete for a Lease over real HTTP, with clocks that the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from coordinator.discovery import lease as lease_module
from coordinator.discovery.lease import BELIEF_S, DURATION_S, SHARDS_ANNOTATION, KubernetesLease
from coordinator.discovery.target import LeaseTarget
from protos.errors import InvalidArgument, NotServing
from tests.coordinator.discovery.api_server import Answer, Asked, api_server, refusal, write_kubeconfig

PATH = "/apis/coordination.k8s.io/v1/namespaces/mesh/leases"


class Store:
    """One Lease, kept as an API server does: a write that did not see the latest version is refused."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.broken: list[Answer] = []
        self.methods: list[str] = []

    def __call__(self, asked: Asked) -> Answer:
        self.methods.append(asked.method)
        if self.broken:
            return self.broken.pop(0)
        assert asked.path == f"{PATH}/plan"
        if asked.method == "GET":
            return Answer(body=self.lease) if self.lease else Answer(404, refusal(404, "NotFound", 'leases "plan" not found'))
        assert asked.method == "PUT"
        return self.put(asked.body)

    def put(self, body: dict[str, Any]) -> Answer:
        version = body["metadata"].get("resourceVersion")
        if self.lease is None:
            # Written to its name, it is made.
            return Answer(404, refusal(404, "NotFound", 'leases "plan" not found')) if version else self.keep(body)
        if not version:
            return Answer(422, refusal(422, "Invalid", "metadata.resourceVersion must be specified for an update"))
        if version != self.lease["metadata"]["resourceVersion"]:
            return Answer(409, refusal(409, "Conflict", "the object has been modified"))
        return self.keep(body)

    def keep(self, body: dict[str, Any]) -> Answer:
        assert body["spec"]["leaseDurationSeconds"] > 0
        self.version += 1
        self.lease = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version), "uid": "u"}}
        return Answer(body=self.lease)

    def annotate(self, shards: str | None) -> None:
        assert self.lease
        annotations = {} if shards is None else {SHARDS_ANNOTATION: shards}
        self.keep({**self.lease, "metadata": {**self.lease["metadata"], "annotations": annotations}})

    def label(self) -> None:
        """Change something that is not of the coordinators."""
        assert self.lease
        self.keep({**self.lease, "metadata": {**self.lease["metadata"], "labels": {"seen": str(self.version)}}})

    @property
    def spec(self) -> dict[str, Any]:
        assert self.lease
        return self.lease["spec"]  # type: ignore[no-any-return]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(lease_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
async def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Store]:
    store = Store()
    async with asyncio.timeout(20), api_server(store) as server:
        write_kubeconfig(tmp_path / "config", server.address)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        yield store


@pytest.fixture
async def pair() -> AsyncIterator[tuple[KubernetesLease, KubernetesLease]]:
    first, second = (KubernetesLease(LeaseTarget("mesh", "plan"), identity=name) for name in ("first", "second"))
    yield first, second
    for lease in (first, second):
        await lease._disconnect()


Pair = tuple[KubernetesLease, KubernetesLease]


async def test_one_takes_the_lease_and_the_other_knows_who(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    first, second = pair
    assert (first.term, first.name, first.holder) == (None, "mesh/plan", "")
    await first._try()
    await second._try()
    assert (first.term, second.term) == (1, None)
    assert (first.holder, second.holder) == ("first", "first")
    assert (store.spec["holderIdentity"], store.spec["leaseTransitions"], store.spec["leaseDurationSeconds"]) == ("first", 1, 15)
    assert store.spec["renewTime"].endswith("Z")
    taken = store.spec["acquireTime"]
    clock.now += BELIEF_S - 1
    await first._try()
    assert store.spec["acquireTime"] == taken
    assert store.spec["renewTime"] > taken
    # One request for each look or renewal.
    assert store.methods == ["GET", "PUT", "GET", "PUT"]


async def test_a_holder_that_is_renewed_is_left_alone_however_long(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    first, second = pair
    for _ in range(10):
        await first._try()
        await second._try()
        clock.now += BELIEF_S - 1
    assert (first.term, second.term) == (1, None)
    assert store.spec["leaseTransitions"] == 1


async def test_a_holder_that_is_stopped_disbelieves_before_the_other_takes_over(
    store: Store, clock: SimpleNamespace, pair: Pair
) -> None:
    first, second = pair
    await first._try()
    await second._try()
    clock.now += BELIEF_S + 0.1
    assert first.term is None
    await second._try()
    # What is no renewal keeps nobody alive.
    store.label()
    clock.now += DURATION_S - BELIEF_S
    await second._try()
    assert (second.term, second.holder, store.spec["holderIdentity"]) == (2, "second", "second")
    with capture_logs() as lines:
        await first._try()
    assert (first.term, first.holder) == (None, "second")
    assert [line["event"] for line in lines] == ["lease changed hands", "lease is lost"]


async def test_a_released_lease_is_taken_at_once(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    del clock
    first, second = pair
    await first._try()
    await second._try()
    await first.release()
    await first.release()
    assert "holderIdentity" not in store.spec
    assert first.term is None
    await second._try()
    assert second.term == 2
    await first.release()
    assert store.spec["holderIdentity"] == "second"


async def test_of_two_that_reach_for_it_at_once_one_gets_it(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    del clock
    await asyncio.gather(*(lease._try() for lease in pair))
    assert sorted((lease.term for lease in pair), key=str) == [1, None]
    assert store.spec["leaseTransitions"] == 1


async def test_somebody_who_touches_the_lease_does_not_take_it_away(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    first, _ = pair
    await first._try()
    store.label()
    clock.now += 2
    await first._try()
    clock.now += BELIEF_S - 1
    assert first.term == 1
    assert store.lease is not None
    assert store.lease["metadata"]["labels"]


async def test_a_lease_that_was_deleted_is_made_again_with_a_higher_term(
    store: Store, clock: SimpleNamespace, pair: Pair
) -> None:
    del clock
    first, _ = pair
    await first._try()
    store.spec["leaseTransitions"] = 9
    first._seen["spec"]["leaseTransitions"] = 9
    await first._try()
    store.lease = None
    await first._try()
    assert first.term == store.spec["leaseTransitions"] == 10


async def test_a_term_can_be_begun_above_what_workers_have_seen(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    first, second = pair
    await first._try()
    assert await first.begin_term_after(41) == 42 == first.term == store.spec["leaseTransitions"]
    with pytest.raises(NotServing, match="is held no more"):
        await second.begin_term_after(1)
    store.label()
    with pytest.raises(NotServing, match=r"Lease mesh/plan: .*has been modified"):
        await first.begin_term_after(50)
    clock.now += BELIEF_S + 1
    with pytest.raises(NotServing, match="is held no more"):
        await first.begin_term_after(50)


async def test_run_goes_on_after_errors_which_it_logs_once(
    store: Store, clock: SimpleNamespace, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_S", 0)
    first, _ = pair
    store.broken = [Answer(403, refusal(403, "Forbidden", "leases is forbidden: User x cannot get"))] * 3
    with capture_logs() as lines:
        running = asyncio.create_task(first.run())
        while first.term is None:  # noqa: ASYNC110  # it can only be asked
            await asyncio.sleep(0.001)
        # The server is away for long: who holds the lease does not know that it does.
        store.broken = [Answer(503, refusal(503, "ServiceUnavailable", "down"))] * 5
        clock.now += BELIEF_S + 1
        assert first.term is None
        while first.term is None:  # noqa: ASYNC110  # it can only be asked
            await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.wait([running])
    warnings = [line.get("error", line["event"]) for line in lines if line["log_level"] == "warning"]
    path = f"GET {PATH}/plan"
    assert warnings[0] == f"{path}: leases is forbidden: User x cannot get"
    assert "lease is lost" in warnings
    assert len(warnings) <= 4
    assert first.term == 1
    assert first._api is None


async def test_nothing_that_says_where_the_server_is_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(InvalidArgument, match="the Kubernetes API cannot be reached"):
        await KubernetesLease(LeaseTarget("mesh", "plan")).run()


async def test_a_release_that_fails_is_only_logged(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    del clock
    first, _ = pair
    await first._try()
    store.broken = [Answer(500, refusal(500, "InternalError", "no leader"))]
    with capture_logs() as lines:
        await first.release()
    assert [line["error"] for line in lines] == [f"PUT {PATH}/plan: no leader"]
    assert first.term is None


def test_identities_differ() -> None:
    target = LeaseTarget("mesh", "plan")
    assert KubernetesLease(target)._identity != KubernetesLease(target)._identity


async def test_every_coordinator_hears_how_many_shards_are_wanted(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    del clock
    first, second = pair
    await first._try()
    await second._try()
    assert (first.shards, second.shards) == (None, None)
    waiting = asyncio.create_task(second.wait_shards(None))
    store.annotate("4")
    # The holder's write meets the change, and the next one keeps it.
    await first._try()
    await second._try()
    assert (first.shards, second.shards, await waiting) == (4, 4, 4)
    await first._try()
    assert store.lease
    assert store.lease["metadata"]["annotations"] == {SHARDS_ANNOTATION: "4"}
    assert await second.wait_shards(2) == 4


@pytest.mark.parametrize("text", ["", "0", "-2", "2.5", "two", "4 ", "123456"])
async def test_what_is_no_number_of_shards_is_said_once_and_changes_nothing(
    store: Store, clock: SimpleNamespace, pair: Pair, text: str
) -> None:
    del clock
    first, _ = pair
    await first._try()
    store.annotate("2")
    await first._try()
    with capture_logs() as lines:
        store.annotate(text)
        for _ in range(3):
            await first._try()
    assert first.shards == 2
    assert [line["event"] for line in lines] == ["the lease names no number of shards"]


async def test_an_annotation_that_goes_away_changes_nothing(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    del clock
    first, _ = pair
    await first._try()
    store.annotate("2")
    await first._try()
    store.annotate(None)
    await first._try()
    assert first.shards == 2


async def test_whoever_asks_for_shards_keeps_what_the_holder_wrote(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    del clock
    first, second = pair
    await first._try()
    # Another write comes between; it is tried again.
    store.broken = [Answer(body=store.lease), Answer(409, refusal(409, "Conflict", "the object has been modified"))]
    await second.ask_shards(4)
    assert store.lease
    assert (store.spec["holderIdentity"], store.lease["metadata"]["annotations"]) == ("first", {SHARDS_ANNOTATION: "4"})
    store.broken = [Answer(403, refusal(403, "Forbidden", "leases plan is forbidden"))]
    with pytest.raises(NotServing, match=r"Lease mesh/plan cannot be told how many shards are wanted: .*forbidden"):
        await second.ask_shards(2)


async def test_a_lease_that_was_deleted_is_made_anew_with_what_it_said(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    del clock
    first, _ = pair
    seen = asyncio.create_task(first.wait_seen())
    await first._try()
    await asyncio.wait_for(seen, 5)
    store.annotate("4")
    store.label()
    await first._try()
    assert store.lease
    labels = store.lease["metadata"]["labels"]
    store.lease = None
    await first._try()
    assert store.lease
    assert store.lease["metadata"]["annotations"] == {SHARDS_ANNOTATION: "4"}
    # Its release knows it again.
    assert store.lease["metadata"]["labels"] == labels


async def test_of_two_that_make_the_lease_at_once_one_holds_it(store: Store, clock: SimpleNamespace, pair: Pair) -> None:
    del clock
    first, second = pair
    # Both see that there is none.
    absent = Answer(404, refusal(404, "NotFound", 'leases "plan" not found'))
    store.broken = [absent]
    await first._try()
    store.broken = [absent]
    await second._try()
    assert (first.term, second.term) == (1, None)
    await second._try()
    assert second.holder == "first"
