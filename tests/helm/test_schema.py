"""Every rendered document against Kubernetes' own schemas, strictly, for the oldest version that is promised and the newest."""

import copy

import pytest

from tests.helm.chart import CHART, NEWEST, OLDEST, helm, render
from tests.helm.matrix import CASES
from tests.helm.schemas import CUSTOM, errors


def test_the_chart_has_no_lint() -> None:
    assert "1 chart(s) linted, 0 chart(s) failed" in helm("lint", "--strict", str(CHART)).stdout


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("case", CASES)
def test_documents_are_what_kubernetes_takes(case: str, version: str) -> None:
    rendered = render(CASES[case], kube_version=version)
    assert len(rendered.documents) > 10
    assert errors(rendered.documents, version) == []


def test_the_matrix_makes_every_kind_of_custom_resource() -> None:
    made = {f"{document['apiVersion']} {document['kind']}" for values in CASES.values() for document in render(values).documents}
    assert CUSTOM.keys() <= made


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "replicas"), "two"),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "readinesProbe"), {}),
        ("NetworkPolicy", ("spec", "podSelectr"), {}),
        ("PodMonitor", ("spec", "podMetricsEndpoints", 0, "prt"), "metrics"),
        ("PodMonitor", ("kind",), "PodMonitr"),
    ],
)
def test_mistakes_are_found(kind: str, path: tuple[str | int, ...], value: object) -> None:
    documents = copy.deepcopy(render(CASES["pod monitor"]).of_kind(kind))
    place = documents[0]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert errors(documents, NEWEST)


def test_before_1_21_disruption_budgets_are_of_the_older_api_and_probes_are_programs_before_1_24() -> None:
    old, new = render(kube_version="1.20.0"), render(kube_version="1.24.0")
    assert {budget["apiVersion"] for budget in old.of_kind("PodDisruptionBudget")} == {"policy/v1beta1"}
    assert {budget["apiVersion"] for budget in new.of_kind("PodDisruptionBudget")} == {"policy/v1"}
    for component in ("coordinator", "worker"):
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert "exec" in old.pod(component)["containers"][0][probe]
            assert "grpc" in new.pod(component)["containers"][0][probe]
