"""The model on a node's disk, and claims on it: what an administrator does who has no storage class to make volumes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.helm.chart import ROOT
from tests.kind.cluster import WORKER, Namespace, apply, kubectl, poll
from tests.smollm2 import SMOLLM2

if TYPE_CHECKING:
    from tests.kind.cluster import Json

COPY_S = 240.0
BOUND_S = 60.0
SIZE = "1Gi"
CLAIM = "model"
"""Name of the claim, in each namespace that has one."""
_POD = "files"
_SELECTOR = "app=files"


class NodeFolder:
    """A folder with the model on one node, written by a pod there that may."""

    def __init__(self, namespace: Namespace) -> None:
        """Copy nothing yet.

        Args:
            namespace: of that pod; its name is the folder's too.

        """
        self._namespace = namespace
        self._path = f"/tmp/{namespace.name}"  # noqa: S108  # of the node
        self._node = ""
        self._volumes: list[str] = []

    def fill(self) -> None:
        """Copy the model there."""
        apply(self._pod())
        poll("a pod on the node", self._is_running, 120)
        self._node = self._namespace.get("pod", _POD)["spec"]["nodeName"]
        folder = SMOLLM2.relative_to(ROOT)
        # kubectl takes what is before a colon for a pod's name: a relative path has none.
        self._namespace.kubectl("cp", str(folder), f"{_POD}:/files/{folder.name}", timeout_s=COPY_S)
        self._namespace.kubectl("exec", _POD, "--", "chmod", "-R", "a+rX", "/files")

    def make_claim(self, namespace: Namespace) -> None:
        """Make a volume of that folder, and a claim that is bound to it."""
        name = f"{namespace.name}-model"
        self._volumes.append(name)
        apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": name},
                "spec": {
                    "capacity": {"storage": SIZE},
                    "accessModes": ["ReadWriteOnce"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "storageClassName": "",
                    "claimRef": {"namespace": namespace.name, "name": CLAIM},
                    "hostPath": {"path": self._path},
                    "nodeAffinity": {
                        "required": {
                            "nodeSelectorTerms": [
                                {
                                    "matchExpressions": [
                                        {"key": "kubernetes.io/hostname", "operator": "In", "values": [self._node]}
                                    ]
                                }
                            ]
                        }
                    },
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": CLAIM, "namespace": namespace.name},
                "spec": {
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": "",
                    "volumeName": name,
                    "resources": {"requests": {"storage": SIZE}},
                },
            },
        )

        poll("the claim to be bound", lambda: namespace.get("pvc", CLAIM)["status"].get("phase") == "Bound", BOUND_S)

    def remove(self) -> None:
        """Remove the volumes, and what was copied."""
        if self._volumes:
            kubectl("delete", "persistentvolume", *self._volumes, "--ignore-not-found", "--wait=false")
        if self._node:
            self._namespace.kubectl("exec", _POD, "--", "sh", "-c", "rm -rf /files/*")

    def _pod(self) -> Json:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": _POD, "namespace": self._namespace.name, "labels": {"app": "files"}},
            "spec": {
                "automountServiceAccountToken": False,
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 0,
                "containers": [
                    {
                        "name": "files",
                        "image": WORKER,
                        "imagePullPolicy": "IfNotPresent",
                        "command": ["sleep", "7200"],
                        # The folder is made by kubelet, for root.
                        "securityContext": {"runAsUser": 0},
                        "volumeMounts": [{"name": "files", "mountPath": "/files"}],
                    }
                ],
                "volumes": [{"name": "files", "hostPath": {"path": self._path, "type": "DirectoryOrCreate"}}],
            },
        }

    def _is_running(self) -> bool:
        return any(pod["status"]["phase"] == "Running" for pod in self._namespace.pods(_SELECTOR))
