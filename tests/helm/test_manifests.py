"""k8s/: as fresh as the chart, complete with kustomize, and its instructions make what it needs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helm.chart import NEWEST, OLDEST, ROOT, Document, Rendered, find_tool, helm, parse
from tests.helm.schemas import errors

K8S = ROOT / "k8s"


def kubectl(*arguments: str) -> list[Document]:
    program = find_tool("kubectl")
    if program is None:
        pytest.skip("kubectl is not on the PATH: `make k8s-tools` puts it into .venv/bin")
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=True, timeout=60, env={"HOME": "/nonexistent"}
    )
    return parse(done.stdout)


def test_the_manifests_are_what_the_chart_renders() -> None:
    recipe = re.search(r"^k8s:.*\n\t.* (template .*)\\\n\t\t(.*) > (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    arguments = [
        str(ROOT / word) if (ROOT / word).exists() and "/" in word else word for word in shlex.split(recipe[1] + recipe[2])
    ]
    assert recipe[3] == "k8s/shardmesh.yaml"
    assert parse(helm(*arguments).stdout) == parse((K8S / "shardmesh.yaml").read_text()), "run make k8s"


def test_they_hold_no_secret() -> None:
    assert Rendered(parse((K8S / "shardmesh.yaml").read_text())).of_kind("Secret") == []


def test_kustomize_makes_all_of_them_valid_and_in_one_namespace() -> None:
    made = kubectl("kustomize", str(K8S))
    assert len(made) == len(parse((K8S / "shardmesh.yaml").read_text())) + 1
    for version in (OLDEST, NEWEST):
        assert errors(made, version) == []
    assert {document["metadata"].get("namespace") for document in made if document["kind"] != "Namespace"} == {"shardmesh"}
    assert {document["metadata"]["labels"].get("app.kubernetes.io/managed-by") for document in made} == {"kustomize"}


def test_a_namespace_of_another_name_needs_no_other_change(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [base.yaml]\nnamespace: other\n")
    (tmp_path / "base.yaml").write_text((K8S / "shardmesh.yaml").read_text())
    made = Rendered(kubectl("kustomize", str(tmp_path)))
    assert {document["metadata"]["namespace"] for document in made.documents} == {"other"}
    assert [binding["subjects"][0]["namespace"] for binding in made.of_kind("RoleBinding")] == ["other"]
    # The pod knows its own.
    arguments = made.arguments("coordinator")
    assert {
        "--discover=kubernetes:$(POD_NAMESPACE)/shardmesh-workers:7001",
        "--lease=$(POD_NAMESPACE)/shardmesh-coordinator",
    } <= set(arguments)


def test_the_instructions_make_the_secrets_that_the_manifests_name(tmp_path: Path) -> None:
    lines = re.findall(r"^#   (.*)$", (K8S / "kustomization.yaml").read_text(), re.MULTILINE)
    made: dict[str, set[str]] = {}
    for line in lines:
        if line.startswith("coordctl"):
            command = line.replace("coordctl", f"{shlex.quote(sys.executable)} -m coordinator")
            subprocess.run(f"cd {tmp_path} && PYTHONPATH={ROOT} {command}", shell=True, check=True, timeout=60)  # noqa: S602
        elif "create secret" in line:
            path = tmp_path / line.rpartition(" ")[2]
            arguments = [*shlex.split(line)[1:-1], str(path), "--dry-run=client", "--output=yaml"]
            (secret,) = kubectl(*arguments)
            made[secret["metadata"]["name"]] = set(secret["data"])
    wanted = {
        volume["secret"]["secretName"]
        for _, template in Rendered(parse((K8S / "shardmesh.yaml").read_text())).workloads()
        for volume in template["spec"]["volumes"]
        if "secret" in volume
    }
    assert set(made) == wanted
    assert made["api-keys"] == {"api-keys"}
    assert made["coordinator-tls"] == made["worker-tls"] == {"tls.crt", "tls.key", "ca.crt"}


def test_the_namespace_refuses_pods_that_are_not_restricted() -> None:
    (namespace,) = parse((K8S / "namespace.yaml").read_text())
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}


def test_the_cluster_for_kind_has_one_node() -> None:
    (cluster,) = parse((K8S / "kind.yaml").read_text())
    assert (cluster["kind"], cluster["apiVersion"]) == ("Cluster", "kind.x-k8s.io/v1alpha4")
    assert cluster["nodes"] == [{"role": "control-plane"}]
