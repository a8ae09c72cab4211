"""Names: as long as Kubernetes allows, and never those of another release."""

import itertools
import re

import pytest

from tests.helm.chart import CHART, Rendered, containers, render
from tests.helm.matrix import CASES

LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
SERVICE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST = "a-very-long-name-of-a-release-that-goes-on-to-the-end"
RELEASES = (
    "mesh",
    "mesh-model",
    "mesh-coordinator",
    "mesh-coordinator-tls",
    "shardmesh",
    "a.b",
    "a-b",
    "7b",
    "m-7b",
    LONGEST,
    LONGEST[:-1] + "x",
    LONGEST[:40],
    LONGEST[:39] + "-",
)
WIDE = ("callers show certificates", "cert-manager", "service monitor", "hub, token in the values", "keda", "route")


def keys(rendered: Rendered) -> set[tuple[str, str]]:
    found = [(document["kind"], document["metadata"]["name"]) for document in rendered.documents]
    found += [("Secret", document["spec"]["secretName"]) for document in rendered.of_kind("Certificate")]
    assert len(set(found)) == len(found), "two resources of one name"
    return set(found)


def test_the_longest_name_is_as_long_as_helm_allows() -> None:
    assert len(LONGEST) == 53


@pytest.mark.parametrize("release", [name.rstrip("-") for name in RELEASES])
def test_names_and_labels_are_valid(release: str) -> None:
    for case in WIDE:
        rendered = render(CASES[case], release=release)
        for document in rendered.documents:
            name = document["metadata"]["name"]
            # Controllers add up to 11 characters, and 63 is the end.
            assert len(name) <= 52
            assert SERVICE.fullmatch(name)
            assert all(LABEL.fullmatch(value) and len(value) <= 63 for value in document["metadata"]["labels"].values())
        for _, template in rendered.workloads():
            assert all(len(container["name"]) <= 63 for container in containers(template["spec"]))


@pytest.mark.parametrize("case", WIDE)
def test_two_releases_in_one_namespace_share_nothing(case: str) -> None:
    releases = sorted({name.rstrip("-") for name in RELEASES})
    owned = {release: keys(render(CASES[case], release=release)) for release in releases}
    for one, other in itertools.combinations(releases, 2):
        assert not owned[one] & owned[other], (one, other)


def test_two_releases_select_only_their_own_pods() -> None:
    one, other = render(release="mesh"), render(release="mesh-model")
    for document in one.of_kind("Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment"):
        selector = document["spec"].get("podSelector") or document["spec"]["selector"]
        assert selector.get("matchLabels", selector)["app.kubernetes.io/instance"] == "mesh"
    assert {template["metadata"]["labels"]["app.kubernetes.io/instance"] for _, template in other.workloads()} == {"mesh-model"}


def test_no_component_ends_with_another() -> None:
    """Otherwise release A with component B-C would own what release A-B with component C does."""
    texts = [path.read_text() for path in (CHART / "templates").rglob("*.*")]
    named = {name for text in texts for name in re.findall(r'"shardmesh\.name" \(list [.$]\w* "([a-z-]+)"\)', text)}
    named |= {name for text in texts for name in re.findall(r'"shardmesh\.metadata" \(list [.$]\w* "[a-z]+" "([a-z-]+)"\)', text)}
    named |= {f"{role}-tls" for role in ("coordinator", "worker", "caller")}
    named |= {f"{component}-metrics" for component in ("coordinator", "worker")}
    assert {"coordinator", "worker", "workers", "model", "environment", "ca"} <= named
    assert [(one, other) for one in named for other in named if one.endswith(f"-{other}")] == []


def test_a_name_given_in_values_is_in_front() -> None:
    rendered = render({"fullnameOverride": "llm"})
    assert {name.partition("-")[0] for _, name in keys(rendered)} == {"llm"}


def test_a_changed_job_has_another_name() -> None:
    names = [render(values).names("Job") for values in ({}, {"model.revision": "v2"}, {"image.tag": "9"}, {"shards": 4})]
    assert names[0] == names[3]
    assert len({*names[0], *names[1], *names[2]}) == 3


@pytest.mark.parametrize(
    ("values", "image"),
    [
        ({}, "shardmesh/worker:0.1.0"),
        ({"image.registry": "r.example.org/llm", "image.tag": "2"}, "r.example.org/llm/shardmesh/worker:2"),
        ({"image.tag": "2", "worker.image.tag": "2-cuda"}, "shardmesh/worker:2-cuda"),
        ({"worker.image.tag": "2", "worker.image.digest": "sha256:" + "ab" * 32}, "shardmesh/worker@sha256:" + "ab" * 32),
    ],
)
def test_images_are_named_by_registry_tag_and_digest(values: dict[str, str], image: str) -> None:
    assert render(values).pod("worker")["containers"][0]["image"] == image
