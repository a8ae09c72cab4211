"""The cluster of KUBECONFIG, as kubectl and helm speak to it. Nothing waits without an end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import tomllib
from typing import TYPE_CHECKING, Any

from tests.helm.chart import ROOT, find_tool
from tests.smollm2 import SMOLLM2

if TYPE_CHECKING:
    from collections.abc import Callable

COMMAND_S = 120.0
POLL_S = 0.5
LAST_LINES = 60

_VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# As `make images` names them; the cluster must have them.
COORDINATOR = os.environ.get("SHARDMESH_COORDINATOR_IMAGE", f"shardmesh/coordinator:{_VERSION}")
WORKER = os.environ.get("SHARDMESH_WORKER_IMAGE", f"shardmesh/worker:{_VERSION}")

Json = dict[str, Any]

_OF_EACH = re.compile(r"(serviceaccount/default|configmap/kube-root-ca\.crt|secret/default-token-\w+)$")


def missing() -> str | None:
    """Say what is not there that these tests need."""
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG names no cluster: `make kind-up` makes one"
    for tool in ("kubectl", "helm"):
        if find_tool(tool) is None:
            return f"{tool} is not on the PATH: `make k8s-tools` puts it into .venv/bin"
    if not (SMOLLM2 / "config.json").exists():
        return "SmolLM2-135M-Instruct is not in models/: `make test` fetches it"
    try:
        kubectl("get", "--raw=/readyz", timeout_s=20)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        return f"the cluster of KUBECONFIG does not answer: {error}"
    return None


def run_tool(tool: str, *arguments: str, stdin: str = "", timeout_s: float = COMMAND_S) -> str:
    """Run kubectl or helm and give what it prints on standard output.

    Raises:
        AssertionError: it failed; with what it said.

    """
    command = [find_tool(tool) or tool, *arguments]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{tool} {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def kubectl(*arguments: str, stdin: str = "", timeout_s: float = COMMAND_S) -> str:
    """Run kubectl; see `run_tool`."""
    return run_tool("kubectl", *arguments, stdin=stdin, timeout_s=timeout_s)


def apply(*documents: Json) -> None:
    """Make objects, or change them."""
    kubectl("apply", "--filename=-", stdin="\n---\n".join(json.dumps(document) for document in documents))


def poll(what: str, condition: Callable[[], Any], deadline_s: float) -> Any:
    """Ask until the answer is true, and give it.

    Raises:
        AssertionError: it was not within `deadline_s` seconds.

    """
    give_up = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < give_up, f"waited {deadline_s:g} s in vain: {what}"
        time.sleep(POLL_S)
    return value


def tell(what: str, seconds: float) -> None:
    """Print a measured figure; pytest shows it with -rP."""
    print(f"{what}: {seconds:.2f} s")  # noqa: T201  # the figures are half of what these tests are for


def is_ready(pod: Json) -> bool:
    """Whether a pod is ready, and not told to go."""
    conditions = pod.get("status", {}).get("conditions", ())
    ready = any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


class Namespace:
    """One namespace, and what is in it."""

    def __init__(self, name: str) -> None:
        """Make nothing yet."""
        self.name = name

    def make(self, *, restricted: bool) -> None:
        """Make it.

        Args:
            restricted: whether pods that do not meet the restricted Pod Security Standard are refused; before 1.23 nobody looks.

        """
        labels = {"pod-security.kubernetes.io/enforce": "restricted"} if restricted else {}
        apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.name, "labels": labels}})
        # Pods are refused until a controller has made it.
        poll("the namespace's service account", lambda: self.kubectl("get", "serviceaccounts", "--output=name"), 30)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        kubectl("delete", "namespace", self.name, "--ignore-not-found", "--timeout=150s", timeout_s=180)

    def kubectl(self, *arguments: str, stdin: str = "", timeout_s: float = COMMAND_S) -> str:
        """Run kubectl in it."""
        return kubectl("--namespace", self.name, *arguments, stdin=stdin, timeout_s=timeout_s)

    def get(self, kind: str, name: str) -> Json:
        """Give one object."""
        found: Json = json.loads(self.kubectl("get", kind, name, "--output=json"))
        return found

    def pods(self, selector: str = "") -> list[Json]:
        """Give the pods that a label selects."""
        found: list[Json] = json.loads(self.kubectl("get", "pods", f"--selector={selector}", "--output=json"))["items"]
        return found

    def everything(self) -> set[str]:
        """Names of all objects of all kinds, as KIND/NAME, but events and what each namespace has."""
        kinds = kubectl("api-resources", "--namespaced", "--verbs=list,delete", "--output=name").split()
        kinds = [kind for kind in kinds if not re.match(r"events(\.|$)", kind)]
        found = self.kubectl("get", ",".join(kinds), "--output=name", "--ignore-not-found").split()
        return {name for name in found if not _OF_EACH.match(name)}

    def wait_pod_ended(self, name: str, deadline_s: float) -> str:
        """Wait until a pod's program has ended well; give what it printed.

        Raises:
            AssertionError: it failed, or did not end within `deadline_s` seconds.

        """
        phase = poll(f"the end of pod {name}", lambda: self._final_phase(name), deadline_s)
        printed = self.kubectl("logs", name)
        assert phase == "Succeeded", f"pod {name}: {phase}: {printed}"
        return printed

    def _final_phase(self, name: str) -> str | None:
        phase: str = self.get("pod", name)["status"]["phase"]
        return phase if phase in {"Succeeded", "Failed"} else None

    def describe(self) -> str:
        """Pods, events and the end of each log, for a person."""
        parts = [
            self._try("get", "pods,leases,endpointslices", "--output=wide"),
            self._try("get", "events", "--sort-by=.lastTimestamp"),
        ]
        for pod in self._try("get", "pods", "--output=name").split():
            logs = ("logs", pod, "--all-containers", "--prefix", f"--tail={LAST_LINES}")
            parts += [self._try(*logs), self._try(*logs, "--previous")]
        return "\n\n".join(part for part in parts if part)

    def _try(self, *arguments: str) -> str:
        try:
            return self.kubectl(*arguments, timeout_s=20)
        except (AssertionError, subprocess.TimeoutExpired):
            return ""
