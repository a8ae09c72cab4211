"""The chart, rendered: `render` gives documents, `Rendered` finds things in them. Needs the program helm, nothing else."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "shardmesh"

NEWEST = "1.37.0"
OLDEST = "1.27.0"

Document = dict[str, Any]

# Nine times as fast, where PyYAML was built with it.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def find_tool(name: str) -> str | None:
    """A program of `make k8s-tools`: named by SHARDMESH_HELM or SHARDMESH_KUBECTL, on the PATH, or beside this Python."""
    named = os.environ.get(f"SHARDMESH_{name.upper()}")
    if named:
        return named
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else shutil.which(name)


def helm(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    program = find_tool("helm")
    assert program, "the fixture of conftest.py skips where helm is missing"
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HELM_CACHE_HOME": home, "HELM_CONFIG_HOME": home, "HELM_DATA_HOME": home}
        # An explicit one: never the cluster of whoever runs the tests.
        environment["KUBECONFIG"] = f"{home}/none" if "--kubeconfig" not in arguments else ""
        done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


def template_arguments(values: Document, release: str, namespace: str, kube_version: str, apis: tuple[str, ...]) -> list[str]:
    given = [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]
    more = [f"--api-versions={api}" for api in apis]
    return ["template", release, str(CHART), "--namespace", namespace, "--kube-version", kube_version, *given, *more]


def render(
    values: Document | None = None,
    *,
    release: str = "mesh",
    namespace: str = "models",
    kube_version: str = NEWEST,
    apis: tuple[str, ...] = (),
) -> Rendered:
    """Render with values on top of the chart's own; keys may be paths: {"tls.mode": "off"}."""
    return Rendered(json.loads(_render(json.dumps(values or {}), release, namespace, kube_version, apis)))


@functools.cache
def _render(values: str, release: str, namespace: str, kube_version: str, apis: tuple[str, ...]) -> str:
    return json.dumps(parse(helm(*template_arguments(json.loads(values), release, namespace, kube_version, apis)).stdout))


def parse(text: str) -> list[Document]:
    """Documents of YAML text."""
    return [document for document in yaml.load_all(text, Loader=LOADER) if document]  # both are safe ones


def refusal(values: Document) -> str:
    """What helm says to values that it must not take."""
    done = helm(*template_arguments(values, "mesh", "models", NEWEST, ()), check=False)
    assert done.returncode != 0, "these values were taken"
    return done.stderr


@dataclass(frozen=True)
class Rendered:
    documents: list[Document]

    def of_kind(self, *kinds: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] in kinds]

    def get(self, kind: str, name: str) -> Document:
        found = [document for document in self.of_kind(kind) if document["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} of {kind} {name}"
        return found[0]

    def names(self, kind: str) -> set[str]:
        return {document["metadata"]["name"] for document in self.of_kind(kind)}

    def workloads(self) -> Iterator[tuple[str, Document]]:
        """Name and pod template of each workload; a bare pod is its own template."""
        for document in self.documents:
            if document["kind"] == "Pod":
                yield document["metadata"]["name"], document
            elif document["kind"] in {"Deployment", "StatefulSet", "Job"}:
                yield document["metadata"]["name"], document["spec"]["template"]

    def pod(self, component: str) -> Document:
        """Spec of the pods of a component."""
        return self.template(component)["spec"]

    def template(self, component: str) -> Document:
        found = [
            template
            for _, template in self.workloads()
            if template["metadata"]["labels"]["app.kubernetes.io/component"] == component
        ]
        assert len(found) == 1, f"{len(found)} workloads of {component}"
        return found[0]

    def arguments(self, component: str) -> list[str]:
        return self.pod(component)["containers"][0]["args"]


def wanted_shards(rendered: Rendered) -> int:
    """How many shards coordinators are told to make: by their Lease, or by an argument where there is none."""
    told = [lease["metadata"]["annotations"]["shardmesh.dev/shards"] for lease in rendered.of_kind("Lease")]
    told += [argument.partition("=")[2] for argument in rendered.arguments("coordinator") if argument.startswith("--shards=")]
    assert len(told) == 1, f"told {len(told)} times"
    return int(told[0])


def containers(pod: Document) -> list[Document]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def selects(selector: Document, labels: Document) -> bool:
    """Whether a selector, of labels or with matchLabels, is met."""
    wanted = selector.get("matchLabels", selector)
    return wanted.items() <= labels.items()
