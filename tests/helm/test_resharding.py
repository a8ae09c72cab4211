"""Another number of shards changes what it must, and starts no coordinator anew."""

import copy
from collections.abc import Iterator

import pytest

from tests.helm.chart import Document, Rendered, render
from tests.helm.matrix import CASES

WITH_LEASE = [case for case, values in CASES.items() if values.get("discovery") != "dns"]
LEASE, WORKERS = ("Lease", "mesh-coordinator"), ("Deployment", "mesh-worker")


def differences(one: object, other: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all values that differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), (*path, key))
    elif one != other:
        yield path


def changes(one: Rendered, other: Rendered) -> dict[tuple[str, str], list[tuple[str, ...]]]:
    """What differs, by kind and name. Not Secrets, which are random where helm cannot look at those that are there."""
    found = {}
    for before, after in zip(*(by_name(rendered) for rendered in (one, other)), strict=True):
        assert before[0] == after[0]
        if paths := list(differences(before[1], after[1])):
            found[before[0]] = paths
    return found


def by_name(rendered: Rendered) -> list[tuple[tuple[str, str], Document]]:
    documents = [document for document in rendered.documents if document["kind"] != "Secret"]
    return [((document["kind"], document["metadata"]["name"]), document) for document in documents]


@pytest.mark.parametrize("case", WITH_LEASE)
def test_another_number_of_shards_changes_the_lease_and_the_number_of_workers_only(case: str) -> None:
    two, four = (render({**CASES[case], "shards": shards}) for shards in (2, 4))
    assert changes(two, four) == {
        LEASE: [("metadata", "annotations", "shardmesh.dev/shards")],
        WORKERS: [("spec", "replicas")],
    }
    told = [rendered.get(*LEASE)["metadata"]["annotations"]["shardmesh.dev/shards"] for rendered in (two, four)]
    # Annotations are text.
    assert told == ["2", "4"]
    assert four.get(*WORKERS)["spec"]["replicas"] - two.get(*WORKERS)["spec"]["replicas"] == 2


def test_without_a_lease_the_coordinator_is_told_by_an_argument_and_starts_anew() -> None:
    two, four = (render({**CASES["dns"], "shards": shards}) for shards in (2, 4))
    assert changes(two, four).keys() == {("Deployment", "mesh-coordinator"), WORKERS}
    arguments = [set(rendered.arguments("coordinator")) for rendered in (two, four)]
    assert (arguments[0] - arguments[1], arguments[1] - arguments[0]) == ({"--shards=2"}, {"--shards=4"})
    assert two.get("Deployment", "mesh-coordinator")["spec"]["strategy"] == {"type": "Recreate"}


def test_a_lease_says_nothing_that_coordinators_write() -> None:
    """Server-side apply would take it from them at each upgrade."""
    assert "spec" not in render().get(*LEASE)


def test_a_change_of_a_pod_is_seen() -> None:
    one = render()
    other = Rendered(copy.deepcopy(one.documents))
    other.pod("coordinator")["containers"][0]["args"].append("--shards=4")
    ((name, paths),) = changes(one, other).items()
    assert (name, len(paths)) == (("Deployment", "mesh-coordinator"), 1)


def test_workers_that_are_to_end_serve_on_for_as_long_as_they_are_told() -> None:
    for seconds in (0, 10, 120):
        pod = render({"worker.preStopSeconds": seconds}).pod("worker")
        sleep = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        assert sleep == ["sleep", str(seconds)]
        assert pod["terminationGracePeriodSeconds"] == seconds + 15
